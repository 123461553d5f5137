// The colour scale of each quantity: one hue, stronger for more; effects have two hues. On canvases, and as a legend.

import { el } from "./dom.js";

const SCHEME = matchMedia("(prefers-color-scheme: dark)");
const known = new Map();
let context = null;

SCHEME.addEventListener("change", () => known.clear());

export const onScheme = (draw) => SCHEME.addEventListener("change", draw);

// [red, green, blue] of a quantity in the present colour scheme.
export function colourOf(quantity) {
  if (!known.has(quantity)) {
    context ??= el("canvas", { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
    context.fillStyle = `hsl(${getComputedStyle(document.documentElement).getPropertyValue(`--${quantity}`)})`;
    context.fillRect(0, 0, 1, 1);
    known.set(quantity, [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)]);
  }
  return known.get(quantity);
}

// How strong the colour of a weight between 0 and 1 is: small weights are visible too.
export const strength = (weight) => Math.sqrt(Math.max(0, Math.min(1, weight)));

// Draws rows x columns values on a canvas, a pixel each. at(row, column): between 0 and 1.
export function paintCells(canvas, rows, columns, at, quantity) {
  [canvas.width, canvas.height] = [columns, rows];
  const brush = canvas.getContext("2d");
  const image = brush.createImageData(columns, rows);
  const [red, green, blue] = colourOf(quantity);
  for (let r = 0, i = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++, i += 4) image.data.set([red, green, blue, 255 * strength(at(r, c))], i);
  }
  brush.putImageData(image, 0, 0);
}

// A bar of the colours of a quantity between two values.
export function legend(quantity, low, high, about) {
  const bar = el("i", { className: `ramp ${quantity}`, "aria-hidden": "true" });
  return el("p", { className: "quiet legend-of" }, el("span", {}, low), bar, el("span", {}, high), el("span", {}, about));
}

// The colour of an effect, from -1 to 1, as a property of an element.
export function tint(element, effect) {
  element.style.setProperty("--weight", strength(Math.abs(effect)).toFixed(3));
  element.classList.toggle("against", effect < 0);
}
