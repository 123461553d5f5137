// Weights over the text itself: while a head is shown, the text has the colours of its attention.

import { $, el, clamp } from "./dom.js";
import { path } from "./state.js";
import { textOf } from "./tree.js";

const SCROLLS_ALONE = matchMedia("(min-width: 1001px)"); // the text scrolls without the rest of the page

let spans = [], layer = null;

// tokens: {start} each, of the text of a side; the weights of paintHeat are theirs, in order.
export function setHeat(side, tokens) {
  clearHeat();
  const text = textOf(path(side));
  layer = $(`heat-${side}`);
  const starts = [...tokens.map(({ start }) => start), tokens.length ? endOf(tokens, text) : 0];
  spans = tokens.map((_, i) => el("span", {}, text.slice(starts[i], starts[i + 1])));
  layer.replaceChildren(text.slice(0, starts[0]), ...spans, text.slice(starts.at(-1)), "\u200b");
}

const endOf = (tokens, text) => tokens.end ?? text.length;

// Scrolls to the strongest token. quantity: the class of the colour scale.
export function paintHeat(weights, quantity = "attention") {
  if (!layer) return;
  const most = Math.max(...weights.slice(weights.length > 1 ? 1 : 0), 1e-9);
  let strongest = 0;
  spans.forEach((span, i) => {
    span.style.setProperty("--weight", clamp((weights[i] ?? 0) / most, 0, 1).toFixed(3));
    if (i && (weights[i] ?? 0) > (weights[strongest || 1] ?? 0)) strongest = i;
  });
  layer.className = `ink heat ${quantity}`;
  layer.parentElement.classList.add("heated");
  if (SCROLLS_ALONE.matches) spans[strongest]?.scrollIntoView({ block: "nearest" });
}

export function hideHeat() {
  layer?.parentElement.classList.remove("heated");
}

export function clearHeat() {
  hideHeat();
  layer?.replaceChildren();
  [spans, layer] = [[], null];
}
