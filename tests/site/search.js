// Search without a server: every word must occur; a word in a title counts more, the whole title most.
const box = document.getElementById("search"), list = document.getElementById("found");

function score(words, [, title, text]) {
  const head = title.toLowerCase(), body = text.toLowerCase();
  let sum = 0;
  for (const word of words) {
    if (head.startsWith(word)) sum += 20 + (head.split(/[\s·]+/)[0] === word ? 20 : 0);
    else if (head.includes(word)) sum += 10;
    else if (body.includes(word)) sum += 1;
    else return 0;
  }
  return sum;
}

function show() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = words.length ? window.SEARCH.map(row => [score(words, row), row]).filter(([points]) => points) : [];
  rows.sort((a, b) => b[0] - a[0]);
  list.replaceChildren(...rows.slice(0, 12).map(([, [url, title, text]]) => {
    const item = document.createElement("li"), link = document.createElement("a"), more = document.createElement("span");
    link.href = window.UP + url;
    link.textContent = title;
    more.textContent = text.slice(0, 110);
    item.append(link, more);
    return item;
  }));
  if (words.length && !rows.length) list.textContent = "nothing found";
  list.hidden = !words.length;
}

box.addEventListener("input", show);
document.addEventListener("keydown", event => {
  if (event.key === "/" && document.activeElement !== box) { event.preventDefault(); box.focus(); }
  if (event.key === "Escape") { box.value = ""; show(); box.blur(); }
  if (event.key === "Enter" && document.activeElement === box) list.querySelector("a")?.click();
});
document.querySelector("nav [aria-current]")?.scrollIntoView({ block: "center" });
