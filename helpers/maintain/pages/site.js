// Search, the switch between light and dark, and boxes that scroll by keyboard. The pages can be read without it.
"use strict";

// ---- light and dark
const root = document.documentElement, button = document.getElementById("theme");
const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
button.hidden = false;
button.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
  name();
});
name();

// ---- what is wider than its box can be reached with the keyboard
function reachable() {
  for (const box of document.querySelectorAll("pre, .scroll, .output_png")) {
    if (box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}
reachable();
addEventListener("resize", reachable);

// ---- search: SECTIONS comes from search.js, which is loaded when somebody first searches
const words = document.getElementById("words"), results = document.getElementById("results");
const MOST = 20;

function matches(query) {
  const terms = query.toLowerCase().split(/\s+/).filter(Boolean);
  const scored = [];
  for (const section of SECTIONS) {
    const title = section.title.toLowerCase(), text = section.text.toLowerCase();
    if (!terms.every((term) => title.includes(term) || text.includes(term))) continue;
    const score = terms.reduce((sum, term) => sum + (title.includes(term) ? 100 : 0) + Math.min(text.split(term).length - 1, 20), 0);
    scored.push([score, section, Math.max(0, text.indexOf(terms[0]))]);
  }
  return scored.sort((a, b) => b[0] - a[0]);
}

function show() {
  const query = words.value.trim(), list = results.querySelector("ol");
  results.hidden = !query;
  const hits = query ? matches(query) : [];
  results.querySelector("p").textContent = hits.length
    ? `${hits.length} section${hits.length > 1 ? "s" : ""}${hits.length > MOST ? `, the first ${MOST}` : ""}`
    : "Nothing found.";
  list.replaceChildren(...hits.slice(0, MOST).map(([, section, at]) => {
    const item = document.createElement("li"), link = document.createElement("a"), part = document.createElement("small");
    link.href = section.file + (section.id ? "#" + encodeURIComponent(section.id) : "");
    link.textContent = `${section.page}: ${section.title}`;
    part.textContent = section.text.slice(Math.max(0, at - 60), at + 120);
    item.append(link, part);
    return item;
  }));
}

words.addEventListener("input", () => {
  if (typeof SECTIONS !== "undefined") return show();
  if (document.querySelector("script[src='search.js']")) return;
  const script = document.createElement("script");
  script.src = "search.js";
  script.onload = show;
  document.head.append(script);
});
words.addEventListener("keydown", (event) => { if (event.key === "Escape") { words.value = ""; show(); } });
results.addEventListener("click", (event) => { if (event.target.closest("a")) results.hidden = true; });
