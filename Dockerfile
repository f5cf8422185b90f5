# docker build -t sahlora . && docker run --rm -v "$PWD/runs:/sahlora/runs" sahlora
# The smoke paper lands in runs/smoke/report; another study: docker run ... sahlora make paper STUDY=demo
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install --yes --no-install-recommends make git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /sahlora
# Requirements first: a changed notebook does not install them again.
COPY settings.ini constraints.txt setup.py pyproject.toml README.md LICENSE Makefile ./
COPY sahlora sahlora
# PyTorch's own index has it without CUDA, some gigabytes less; for a GPU: --build-arg TORCH_INDEX=https://pypi.org/simple
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN PIP_NO_CACHE_DIR=1 PIP_EXTRA_INDEX_URL="$TORCH_INDEX" make setup
COPY . .
RUN touch .venv/.ready

CMD ["make", "paper"]
