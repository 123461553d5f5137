// The attention panel: the heads by layer, and what one of them attends to.

import { requestJson } from "./api.js";
import { drawBars } from "./bars.js";
import { addArrowKeys, button, el, percent, quiet, visible } from "./dom.js";
import { hideHeat, paintHeat, setHeat } from "./heat.js";
import { idsOf, inWindow } from "./tokens.js";

// selected: the token whose prediction is shown; model: the name of the model.
export async function fillAttention(panel, selected, model, info, signal) {
  const before = inWindow(selected.before, info);
  const result = await requestJson("inspect/attention", { model, tokens: idsOf(before) }, signal);
  const tokens = before.slice(-result.texts.length);
  tokens.end = selected.start;
  setHeat(selected.side, tokens);
  draw(panel, result, selected.token.text);
}

// One square for each head; its strength is the largest attention weight, without that of the first token.
function draw(panel, { weights, texts }, word) {
  const [layers, heads] = [weights.length, weights[0].length];
  const intro = quiet("Attention weights at the position that predicts ", el("b", {}, visible(word)),
    ". A row for each layer, a square for each head: the stronger, the larger its largest weight. The first token is not counted, because many heads attend to it by default. Point at a head to see its weights in the text.");
  const text = el("p", { className: "looked attention" });
  const title = el("h2");
  const most = el("ol", { className: "bars attention" });
  const grid = el("div", { className: "heads attention", role: "group", "aria-label": "Heads, by layer" });
  grid.style.setProperty("--heads", heads);
  const show = (name, row) => {
    title.textContent = name;
    paintText(text, texts, row);
    drawBars(most, topPositions(row, texts));
  };
  const squares = weights.flatMap((layer, l) => layer.map((row, h) => headSquare(l, h, row)));
  squares[0].tabIndex = 0;
  const average = texts.map((_, t) => weights.flat().reduce((sum, row) => sum + row[t], 0) / (layers * heads));
  const press = (pressed, name, row) => {
    for (const each of [mean, ...squares]) each.setAttribute("aria-pressed", String(each === pressed));
    show(name, row);
    paintHeat(row);
  };
  const mean = button("All heads together", () => press(mean, "All heads together", average), { className: "plain", "aria-pressed": "true" });
  squares.forEach((square, i) => {
    const [l, h] = [Math.floor(i / heads), i % heads];
    const act = () => press(square, `Layer ${l + 1}, head ${h + 1}`, weights[l][h]);
    for (const name of ["click", "focus", "pointerenter"]) square.addEventListener(name, act);
  });
  grid.addEventListener("pointerleave", () => grid.contains(document.activeElement) || hideHeat());
  grid.addEventListener("focusout", hideHeat);
  grid.append(...squares);
  addArrowKeys(grid, "button", heads);
  panel.replaceChildren(intro, grid, mean, title, text, most);
  show("All heads together", average);
}

function headSquare(l, h, row) {
  const square = el("button", { type: "button", tabIndex: -1, "aria-pressed": "false", "aria-label": `Layer ${l + 1}, head ${h + 1}` });
  square.style.setProperty("--weight", Math.max(...row.slice(row.length > 1 ? 1 : 0)));
  return square;
}

// Shows the strongest token of the text in its box.
function paintText(box, texts, row) {
  const most = Math.max(...row.slice(row.length > 1 ? 1 : 0), 1e-9);
  box.replaceChildren(...texts.map((piece, i) => {
    const mark = el("span", { title: `${visible(piece)} ${percent(row[i])}` }, piece);
    mark.style.setProperty("--weight", Math.min(1, row[i] / most));
    return mark;
  }));
  const strongest = row.length > 1 ? row.indexOf(most, 1) : 0;
  const mark = box.children[strongest];
  if (mark) box.scrollTop = mark.offsetTop - box.offsetTop - box.clientHeight / 2;
}

function topPositions(row, texts) {
  const order = row.map((weight, i) => ({ id: i, text: texts[i], probability: weight, raw: weight }));
  return order.sort((a, b) => b.raw - a.raw).slice(0, 5);
}
