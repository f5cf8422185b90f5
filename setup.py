"""Gives setuptools what settings.ini says: the one place for version, requirements and description."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

# dicom: masks as DICOM SEG and compressed DICOM; slurm: studies on a cluster; docs: the site; bench: the peers in benchmarks/;
# oracles: independent adapter libraries that the tests compare with
EXTRAS = {"dev": "dev", "dicom": "dicom", "tensorboard": "tensorboard", "slurm": "slurm", "docs": "docs", "bench": "bench",
          "oracles": "oracle"}
here = Path(__file__).parent
config = ConfigParser(interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

setup(
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author=settings["author"],
    author_email=settings["author_email"],
    keywords=settings["keywords"],
    install_requires=settings["requirements"].split(),
    extras_require={name: settings[f"{extra}_requirements"].split() for name, extra in EXTRAS.items()},
)
