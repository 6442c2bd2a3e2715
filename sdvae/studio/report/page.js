"use strict";
const find = (id) => document.getElementById(id);

// Each image is in the file once, in the gallery; the other places show it again.
for (const image of document.querySelectorAll("img[data-copy]")) image.src = find(image.dataset.copy).src;

for (const input of document.querySelectorAll(".wipe input")) {
  const show = () => input.parentElement.style.setProperty("--at", `${input.value}%`);
  input.addEventListener("input", show);
  show(); // a browser that reloads the page keeps the value
}

function showGain() {
  document.documentElement.style.setProperty("--gain", find("gain").value);
  for (const output of document.querySelectorAll("output.gain")) output.textContent = find("gain").value;
}
find("gain").addEventListener("input", showGain);
showGain();

// ---- the gallery

const cards = [...find("gallery").children];

function arrange() {
  const wanted = find("filter").value.toLowerCase();
  const order = find("order").value;
  const key = order.replace("-", "");
  const sign = order.startsWith("-") ? -1 : 1;
  const compare = (a, b) =>
    key === "name" ? a.dataset.name.localeCompare(b.dataset.name) : sign * (a.dataset[key] - b.dataset[key]);
  for (const card of cards) card.hidden = !card.dataset.name.toLowerCase().includes(wanted);
  find("gallery").append(...[...cards].sort(compare));
  find("found").textContent = `${cards.filter((card) => !card.hidden).length} shown`;
}
find("filter").addEventListener("input", arrange);
find("order").addEventListener("change", arrange);
arrange();

// ---- one image, enlarged

const dialog = find("zoom");
const stage = find("stage");
const under = find("under");
const over = find("over").firstElementChild;
const LARGEST = 32; // screen pixels to one of the image's
let place = 0; // of the image, in the data
let scale = 1; // 1: the image fits
let x = 0; // of the image's middle, in screen pixels right of the stage's
let y = 0;

/** Screen pixels to one of the image's where it fits. */
function fitted() {
  return Math.min(stage.clientWidth / under.naturalWidth, stage.clientHeight / under.naturalHeight) || 1;
}

function draw() {
  const width = under.naturalWidth * fitted() * scale;
  const height = under.naturalHeight * fitted() * scale;
  const roomX = Math.max(0, (width - stage.clientWidth) / 2);
  const roomY = Math.max(0, (height - stage.clientHeight) / 2);
  x = Math.min(roomX, Math.max(-roomX, x));
  y = Math.min(roomY, Math.max(-roomY, y));
  for (const image of [under, over]) image.style.transform = `translate(${x}px, ${y}px) scale(${scale})`;
  stage.classList.toggle("moves", scale > 1);
  stage.classList.toggle("crisp", fitted() * scale >= 2);
  find("percent").textContent = `${Math.round(100 * fitted() * scale)} %`;
}

/** Enlarge by a factor; the point (px, py), in screen pixels from the stage's middle, stays where it is. */
function enlarge(factor, px = 0, py = 0) {
  const before = scale;
  scale = Math.min(Math.max(1, LARGEST / fitted()), Math.max(1, scale * factor));
  x = px - ((px - x) * scale) / before;
  y = py - ((py - y) * scale) / before;
  draw();
}

function wipeTo(percent) {
  find("wipe").value = percent;
  stage.style.setProperty("--at", `${find("wipe").value}%`);
}

function fit() {
  scale = 1;
  x = y = 0;
  draw();
}

async function show(index) {
  place = index;
  under.src = find(`original-${index}`).src;
  over.src = find(`reconstruction-${index}`).src;
  find("zoom-name").textContent = find(`original-${index}`).closest("figure").dataset.name;
  find("zoom-figures").textContent = find(`figures-${index}`).textContent;
  await Promise.all([under.decode(), over.decode()]); // fitted() needs their sizes
  draw();
}

function step(by) {
  const order = [...find("gallery").children].filter((card) => !card.hidden).map((card) => +card.dataset.place);
  if (order.length) show(order[(order.indexOf(place) + by + order.length) % order.length]);
}

function setMode(difference) {
  find("mode").checked = difference;
  stage.classList.toggle("plain", difference);
}

for (const button of document.querySelectorAll("[data-zoom]")) {
  button.addEventListener("click", () => {
    dialog.showModal();
    setMode(button.dataset.mode === "difference");
    wipeTo(50);
    scale = 1;
    show(+button.dataset.zoom);
    find("wipe").focus();
  });
}
find("close").addEventListener("click", () => dialog.close());
find("wipe").addEventListener("input", () => wipeTo(find("wipe").value));
find("mode").addEventListener("change", () => setMode(find("mode").checked));
find("in").addEventListener("click", () => enlarge(1.5));
find("out").addEventListener("click", () => enlarge(1 / 1.5));
find("fit").addEventListener("click", fit);
find("next").addEventListener("click", () => step(1));
find("previous").addEventListener("click", () => step(-1));
addEventListener("resize", () => dialog.open && draw());

/** Of an event: screen pixels from the stage's middle. */
function point(event) {
  const box = stage.getBoundingClientRect();
  return [event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2];
}

const touching = new Map(); // pointer -> its last point
stage.addEventListener("pointerdown", (event) => {
  stage.setPointerCapture(event.pointerId);
  touching.set(event.pointerId, point(event));
  if (touching.size === 1 && scale === 1) wipeTo((100 * (point(event)[0] + stage.clientWidth / 2)) / stage.clientWidth);
});
stage.addEventListener("pointermove", (event) => {
  if (!touching.has(event.pointerId)) return;
  const [fromX, fromY] = touching.get(event.pointerId);
  const [toX, toY] = point(event);
  touching.set(event.pointerId, [toX, toY]);
  if (touching.size === 2) {
    const [[otherX, otherY]] = [...touching].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
    const before = Math.hypot(fromX - otherX, fromY - otherY);
    if (before > 0) enlarge(Math.hypot(toX - otherX, toY - otherY) / before, otherX, otherY);
  } else if (scale > 1) {
    x += toX - fromX;
    y += toY - fromY;
    draw();
  } else {
    wipeTo((100 * (toX + stage.clientWidth / 2)) / stage.clientWidth);
  }
});
for (const end of ["pointerup", "pointercancel"]) {
  stage.addEventListener(end, (event) => touching.delete(event.pointerId));
}
stage.addEventListener(
  "wheel",
  (event) => {
    event.preventDefault();
    enlarge(Math.exp(-event.deltaY / 400), ...point(event));
  },
  { passive: false },
);
stage.addEventListener("dblclick", (event) => (scale > 1 ? fit() : enlarge(4, ...point(event))));
dialog.addEventListener("keydown", (event) => {
  const actions = { "+": () => enlarge(1.5), "-": () => enlarge(1 / 1.5), 0: fit };
  if (event.key in actions) actions[event.key]();
  else if (document.activeElement === stage && event.key.startsWith("Arrow")) {
    const [right, down] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (scale > 1) {
      x -= 40 * right;
      y -= 40 * down;
      draw();
    } else wipeTo(+find("wipe").value + 2 * right);
  } else return;
  event.preventDefault();
});
