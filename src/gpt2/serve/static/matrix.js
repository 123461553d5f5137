// The attention matrix of one head: a row for each token that attends, a column for each token it may attend to. It is
// read by pointing at it or at a token of the text, or with two sliders.

import { clamp, el, percent, visible } from "./dom.js";
import { legend, onScheme, paintCells } from "./scale.js";

const MOST_PIXELS = 400; // a larger matrix is drawn as the largest weights of its fields

// Weights from base64: the rows of a lower triangle, uint16 each.
export function unpackTriangle(packed, size) {
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const values = new Uint16Array(bytes.buffer, 0, (size * (size + 1)) / 2);
  return (row, column) => (column > row ? 0 : values[(row * (row + 1)) / 2 + column] / 65535);
}

export const rowOf = (at, row, size) => Array.from({ length: size }, (_, column) => at(row, column));
export const columnOf = (at, column, size) => Array.from({ length: size }, (_, row) => at(row, column));

// onPoint(row, column) is called for each field that is pointed at. Returns {element, show(at, hideFirst), select}.
export function attentionMatrix(texts, onPoint) {
  const size = texts.length;
  const canvas = el("canvas", { className: "cells" });
  const [across, down] = [el("i", { className: "across" }), el("i", { className: "down" })];
  const field = el("div", { className: "matrix", "aria-hidden": "true" }, canvas, across, down);
  const readout = el("p", { className: "readout", role: "status" });
  const sliders = ["Row, which attends", "Column, attended to"].map((label) => {
    const range = el("input", { type: "range", min: 0, max: size - 1, step: 1, value: size - 1, "aria-label": label });
    return { range, label: el("label", { className: "axis" }, el("span", {}, label), range) };
  });
  let at = () => 0, isFirstHidden = true, point = [size - 1, Math.min(1, size - 1)];

  const draw = () => {
    const pixels = Math.min(size, MOST_PIXELS), step = size / pixels;
    const value = (r, c) => (isFirstHidden && c === 0 ? 0 : at(r, c));
    if (step === 1) return paintCells(canvas, size, size, value, "attention");
    const cells = new Float32Array(pixels * pixels);
    for (let r = 0; r < size; r++) {
      const begin = Math.floor(r / step) * pixels;
      for (let c = 0; c <= r; c++) cells[begin + Math.floor(c / step)] = Math.max(cells[begin + Math.floor(c / step)], value(r, c));
    }
    paintCells(canvas, pixels, pixels, (r, c) => cells[r * pixels + c], "attention");
  };
  const select = (row, column) => {
    point = [clamp(row, 0, size - 1), clamp(column, 0, size - 1)];
    const [r, c] = point;
    across.style.setProperty("--at", r / size);
    down.style.setProperty("--at", c / size);
    field.style.setProperty("--cell", 1 / size);
    sliders.forEach(({ range }, i) => {
      range.value = point[i];
      range.style.setProperty("--fill", `${(100 * point[i]) / Math.max(1, size - 1)}%`);
      range.setAttribute("aria-valuetext", `${visible(texts[point[i]])}, token ${point[i] + 1}`);
    });
    const weight = c > r ? "comes later, and cannot be attended to" : percent(at(r, c));
    readout.replaceChildren(el("b", {}, visible(texts[r])), ` ${r + 1} → `, el("b", {}, visible(texts[c])), ` ${c + 1}: ${weight}`);
    onPoint(r, c);
  };
  field.addEventListener("pointermove", (event) => {
    const { left, top, width, height } = field.getBoundingClientRect();
    const place = [Math.floor(((event.clientY - top) / height) * size), Math.floor(((event.clientX - left) / width) * size)];
    if (place[0] !== point[0] || place[1] !== point[1]) select(...place);
  });
  sliders.forEach(({ range }, i) => range.addEventListener("input", () => select(...point.map((old, j) => (i === j ? Number(range.value) : old)))));
  onScheme(() => field.isConnected && draw());
  const element = el("div", {}, field, readout, ...sliders.map(({ label }) => label), legend("attention", "0", "100 %", "attention weight"));
  const show = (weights, hideFirst) => {
    [at, isFirstHidden] = [weights, hideFirst];
    draw();
    select(...point);
  };
  return { element, show, select };
}
