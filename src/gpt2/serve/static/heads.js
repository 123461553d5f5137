// All heads of a text: thumbnails of their attention matrices by layer and head, their kinds, and the matrix of one.

import { requestJson } from "./api.js";
import { addArrowKeys, button, el, percent, quiet, visible } from "./dom.js";
import { hideHeat, paintHeat, setHeat } from "./heat.js";
import { state } from "./state.js";
import { runLatestAndReport } from "./notice.js";
import { attentionMatrix, columnOf, rowOf, unpackTriangle } from "./matrix.js";
import { legend, onScheme, paintCells } from "./scale.js";
import { idsOf } from "./tokens.js";

export const KINDS = { previous: "Previous token", duplicate: "Duplicate token", induction: "Induction" };
const LEAST_SCORE = 0.4; // of a head that has a kind
const scores = new Map(); // by the name of the model
const shown = { layer: 0, head: 0, first: false, direction: "row" }; // what the reader chose; first: the first token too

export const headName = (layer, head) => `Layer ${layer + 1}, head ${head + 1}`;

export const chooseHead = (layer, head) => Object.assign(shown, { layer, head });

async function scoresOf(model, signal) {
  if (!scores.has(model)) scores.set(model, await requestJson("inspect/head-scores", { model }, signal));
  return scores.get(model);
}

// The kind of a head, {kind, score}, by its largest score; null if that is small.
export function kindOf(found, layer, head) {
  const [kind, score] = Object.keys(KINDS).map((name) => [name, found[name][layer][head]]).sort((a, b) => b[1] - a[1])[0];
  return score < LEAST_SCORE ? null : { kind, score };
}

// tokens: of the text, from tokensOf, as many as fit the context.
export async function fillHeads(panel, side, info, tokens, signal) {
  const key = `${side} ${info.name} ${idsOf(tokens)}`;
  if (panel.key !== key) {
    const body = { model: info.name, tokens: idsOf(tokens) };
    const [result, found] = [await requestJson("inspect/heads", body, signal), await scoresOf(info.name, signal)];
    panel.key = key;
    draw(panel, result, found, body, info);
  }
  panel.matrix.mark();
  setHeat(side, tokens.slice(-panel.matrix.size));
  await panel.matrix.load(signal);
}

function draw(panel, { heads, size, texts }, found, body, info) {
  const matrix = drawMatrix(texts, body, found), load = runLatestAndReport(0, matrix.load);
  const squares = heads.flatMap((layer, l) => layer.map((map, h) => thumbnail(map, size, l, h, kindOf(found, l, h))));
  const grid = el("div", { className: "heads thumbs", role: "group", "aria-label": "Attention matrices, by layer and head" }, ...squares.map(({ element }) => element));
  grid.style.setProperty("--heads", info.n_head);
  const press = () => {
    squares.forEach(({ element, layer, head }) => {
      const isShown = layer === shown.layer && head === shown.head;
      element.setAttribute("aria-pressed", String(isShown));
      element.tabIndex = isShown ? 0 : -1;
    });
  };
  const choose = (layer, head) => {
    Object.assign(shown, { layer, head });
    press();
    load();
  };
  if (shown.layer >= info.n_layer || shown.head >= info.n_head) Object.assign(shown, { layer: 0, head: 0 });
  squares.forEach(({ element, layer, head }) => element.addEventListener("click", () => choose(layer, head)));
  addArrowKeys(grid, "button", info.n_head);
  const paint = () => squares.forEach((square) => square.paint());
  const first = el("input", { type: "checkbox", checked: shown.first, id: "first-token" });
  first.addEventListener("change", () => {
    shown.first = first.checked;
    paint();
    matrix.refresh();
  });
  onScheme(() => grid.isConnected && paint());
  press();
  paint();
  panel.matrix = { ...matrix, mark: press };
  panel.replaceChildren(
    quiet("The attention matrix of each head: a row of squares for each layer. Choose one to see all of it."),
    el("label", { className: "check" }, first, "Show the first token, to which many heads attend by default"),
    grid, legend("attention", "0", "100 %", "attention weight"), drawKinds(found, info, choose), matrix.element,
  );
}

function thumbnail(map, size, layer, head, kind) {
  const bytes = Uint8Array.from(atob(map), (letter) => letter.charCodeAt(0));
  const canvas = el("canvas", { className: "cells" });
  const label = `${headName(layer, head)}${kind ? `: ${KINDS[kind.kind].toLowerCase()} ${kind.score.toFixed(2)}` : ""}`;
  const element = el("button", { type: "button", title: label, "aria-label": label }, canvas);
  if (kind) element.dataset.kind = kind.kind[0].toUpperCase();
  const paint = () => paintCells(canvas, size, size, (r, c) => (c === 0 && !shown.first ? 0 : bytes[r * size + c] / 255), "attention");
  return { element, layer, head, paint };
}

// The heads of each kind, the clearest first.
function drawKinds(found, info, choose) {
  const list = el("dl", { className: "kinds" });
  const all = Array.from({ length: info.n_layer * info.n_head }, (_, i) => [Math.floor(i / info.n_head), i % info.n_head]);
  for (const [name, title] of Object.entries(KINDS)) {
    const own = all.map(([l, h]) => ({ l, h, kind: kindOf(found, l, h) })).filter(({ kind }) => kind?.kind === name).sort((a, b) => b.kind.score - a.kind.score);
    const names = own.slice(0, 6).map(({ l, h, kind }) => button(`${l + 1}.${h + 1}`, () => choose(l, h), { className: "plain", title: `${headName(l, h)}: ${kind.score.toFixed(2)}`, "aria-label": `${headName(l, h)}, score ${kind.score.toFixed(2)}` }));
    list.append(el("dt", {}, el("b", {}, title[0]), ` ${title}`), el("dd", {}, ...(own.length ? names : [`none above ${LEAST_SCORE}`])));
  }
  return list;
}

// The matrix of the chosen head, and the text with the weights of a row or column.
function drawMatrix(texts, body, found) {
  const title = el("h2"), note = quiet(), size = texts.length;
  const keep = button("Add to the export", () => {
    const name = `${shown.layer}.${shown.head}`;
    if (!state.kept.delete(name)) state.kept.add(name);
    markKept();
  }, { className: "plain" });
  const markKept = () => keep.setAttribute("aria-pressed", String(state.kept.has(`${shown.layer}.${shown.head}`)));
  const words = el("p", { className: "looked attention", tabIndex: 0, role: "region", "aria-label": "Text, with the weights of a row or column" }, ...texts.map((text) => el("span", {}, text)));
  let at = () => 0;
  const matrix = attentionMatrix(texts, (row, column) => paintText(row, column));
  const paintText = (row, column) => {
    const isRow = shown.direction === "row", here = isRow ? row : column;
    const weights = (isRow ? rowOf : columnOf)(at, here, size);
    const seen = shown.first || !isRow ? weights : weights.map((weight, i) => (i ? weight : 0));
    const most = Math.max(...seen, 1e-9);
    [...words.children].forEach((word, i) => {
      word.style.setProperty("--weight", (seen[i] / most).toFixed(3));
      word.title = `${visible(texts[i])} ${percent(weights[i])}`;
      word.classList.toggle("here", i === here);
    });
    if (element.matches(":hover, :focus-within")) paintHeat(seen);
  };
  const directions = { row: "What a token attends to", column: "What attends to a token" };
  const buttons = Object.entries(directions).map(([name, label]) => button(label, () => {
    shown.direction = name;
    mark();
    matrix.select(size - 1, name === "row" ? 0 : Math.floor(size / 2));
  }));
  const mark = () => buttons.forEach((each, i) => each.setAttribute("aria-pressed", String(Object.keys(directions)[i] === shown.direction)));
  words.addEventListener("pointerover", ({ target }) => {
    const i = [...words.children].indexOf(target);
    if (i < 0) return;
    if (shown.direction === "row") matrix.select(i, Math.min(i, 1));
    else matrix.select(size - 1, i);
  });
  mark();
  const element = el("div", { className: "one-head" }, el("div", { className: "row" }, title, keep), note, matrix.element, el("div", { className: "segments", role: "group", "aria-label": "Direction" }, ...buttons), words);
  for (const name of ["pointerleave", "focusout"]) element.addEventListener(name, hideHeat);
  const refresh = () => matrix.show(at, !shown.first);
  const load = async (signal) => {
    const { layer, head } = shown;
    const { weights } = await requestJson("inspect/head", { ...body, layer, head }, signal);
    if (layer !== shown.layer || head !== shown.head) return;
    at = unpackTriangle(weights, size);
    const kind = kindOf(found, layer, head);
    title.textContent = headName(layer, head);
    markKept();
    note.textContent = kind ? `${KINDS[kind.kind]} head: score ${kind.score.toFixed(2)} on a repeated random text.` : "No kind: its scores on a repeated random text are small.";
    refresh();
  };
  return { element, size, load, refresh };
}
