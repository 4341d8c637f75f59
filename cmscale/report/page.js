// The page is whole without this program, which adds a slider over the grids, downloads, and the renewal of a served page.
"use strict";

const numbers = JSON.parse(document.getElementById("numbers").textContent);

function save(name, content, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = `${numbers.run}-${name}`.replace(/[^\p{L}\p{N}._-]+/gu, "_");
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function savePicture(card, title) {
  const drawing = card.querySelector("svg");
  const { width, height } = drawing.viewBox.baseVal;
  const copy = drawing.cloneNode(true);
  copy.setAttribute("width", width * 3);
  copy.setAttribute("height", height * 3);
  copy.setAttribute("color", "#1d2128");
  copy.setAttribute("font-family", "sans-serif");
  const picture = new Image();
  picture.onload = () => {
    const canvas = document.createElement("canvas");
    canvas.width = picture.width;
    canvas.height = picture.height;
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(picture, 0, 0);
    canvas.toBlob((blob) => save(`${title}.png`, blob, "image/png"));
  };
  picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`;
}

for (const button of document.querySelectorAll("button[data-save]")) {
  button.hidden = false;
  button.onclick = () => {
    const card = button.closest(".card");
    const title = card ? card.querySelector("h3").textContent : "evaluations";
    if (button.dataset.save === "png") savePicture(card, title);
    else if (button.dataset.save === "json") save(`${title}.json`, JSON.stringify(numbers.evaluations, null, 1), "application/json");
    else save(`${title}.csv`, card ? numbers.curves[title] : numbers.table, "text/csv");
  };
}

const viewer = document.getElementById("grids");
const kept = (name, value) => {
  try {
    if (value === undefined) return sessionStorage.getItem(`${location.pathname} ${name}`);
    sessionStorage.setItem(`${location.pathname} ${name}`, value);
  } catch { /* a browser that keeps nothing */ }
  return null;
};
// What a renewal keeps is found again by its words: the numbers in them grow, and others like it may come before it.
function byWords(selector) {
  const found = new Map();
  for (const each of document.querySelectorAll(selector)) {
    const words = `${each.tagName} ${each.ariaLabel ?? each.textContent}`.replace(/[\d,]+/g, "");
    let place = 1;
    while (found.has(`${words} ${place}`)) place += 1;
    found.set(`${words} ${place}`, each);
  }
  return found;
}

if (viewer) {
  const figures = [...viewer.querySelectorAll("figure")];
  const slider = viewer.querySelector("input");
  const last = figures.length - 1;
  const caption = (place) => figures[place].querySelector("figcaption").textContent;
  const stepAt = (place) => Number(caption(place).replace(/\D/g, ""));
  const show = () => {
    figures.forEach((figure, place) => { figure.hidden = place !== Number(slider.value); });
    slider.setAttribute("aria-valuetext", caption(slider.value));
  };
  slider.hidden = last < 1;
  slider.max = last;
  slider.value = last;
  if (kept("step")) slider.value = Math.max(0, figures.findLastIndex((_, place) => stepAt(place) <= Number(kept("step"))));
  slider.oninput = () => {
    show();
    kept("step", Number(slider.value) === last ? "" : stepAt(slider.value));
  };
  show();
  viewer.classList.add("one");
}

for (const [words, summary] of byWords("summary")) {
  const folded = summary.parentElement;
  if (kept(words)) folded.open = kept(words) === "open";
  folded.ontoggle = () => kept(words, folded.open ? "open" : "closed");
}

const version = document.documentElement.dataset.version;
if (version) {
  const focusable = "a, button, input, summary";
  const wordsOf = (selector, wanted) => [...byWords(selector)].findLast(([, each]) => wanted(each))?.[0] ?? "";
  const top = (each) => each.getBoundingClientRect().top;
  addEventListener("pagehide", () => {
    const section = wordsOf("h2", (each) => top(each) < 0);
    kept("section", section);
    kept("scroll", section ? -top(byWords("h2").get(section)) : scrollY);
    kept("focus", wordsOf(focusable, (each) => each === document.activeElement));
  });
  history.scrollRestoration = "manual"; // a browser does it before the grids are folded, and misses
  const section = byWords("h2").get(kept("section"));
  scrollTo(0, Number(kept("scroll")) + (section ? top(section) + scrollY : 0));
  byWords(focusable).get(kept("focus"))?.focus({ preventScroll: true });
  let held = false; // the slider, or a link
  addEventListener("pointerdown", (event) => { held = event.button === 0; });
  for (const ended of ["pointerup", "pointercancel"]) addEventListener(ended, () => { held = false; });
  const told = document.getElementById("unrenewed");
  let since = new Date();
  const renew = async () => {
    try {
      const answer = await fetch("version", { cache: "no-store", signal: AbortSignal.timeout(10000) });
      const text = await answer.text();
      if (!answer.ok) throw new Error(text);
      if (text === version) {
        since = new Date();
        told.hidden = true;
      } else if (!getSelection().isCollapsed) {
        throw new Error("text is selected");
      } else if (held) {
        throw new Error("a button is held");
      } else {
        location.reload();
        return;
      }
    } catch (error) { // the page stays as it is
      const isSilent = error instanceof TypeError || error.name === "TimeoutError";
      const why = isSilent ? "its server does not answer" : error.message;
      told.textContent = `Not renewed since ${since.toLocaleTimeString()}: ${why}`;
      told.hidden = false;
    }
    setTimeout(renew, 3000);
  };
  setTimeout(renew, 3000);
}
