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
if (viewer) {
  const figures = [...viewer.querySelectorAll("figure")];
  const slider = viewer.querySelector("input");
  const show = () => {
    figures.forEach((figure, place) => { figure.hidden = place !== Number(slider.value); });
    slider.setAttribute("aria-valuetext", figures[slider.value].querySelector("figcaption").textContent);
  };
  slider.hidden = figures.length < 2;
  slider.max = figures.length - 1;
  slider.value = kept("grid") ?? figures.length - 1;
  slider.oninput = () => {
    show();
    kept("grid", Number(slider.value) === figures.length - 1 ? "" : slider.value);
  };
  if (kept("grid") === "") slider.value = figures.length - 1;
  show();
  viewer.classList.add("one");
}

for (const [place, folded] of document.querySelectorAll("details").entries()) {
  if (kept(`details ${place}`)) folded.open = kept(`details ${place}`) === "open";
  folded.ontoggle = () => kept(`details ${place}`, folded.open ? "open" : "closed");
}

const version = document.documentElement.dataset.version;
if (version) {
  setInterval(async () => {
    try {
      const answer = await fetch("version", { cache: "no-store" });
      if (answer.ok && (await answer.text()) !== version) location.reload();
    } catch { /* the server has ended: the page stays as it is */ }
  }, 3000);
}
