// The text area, and behind it the colours of the generated tokens; and the text of B.

import { $, el, shadeOf } from "./dom.js";
import { textReplaced, onRender, path, state } from "./state.js";
import { edit, makeTree, textOf } from "./tree.js";
import { remember } from "./undo.js";

const text = $("text");
const painted = new WeakMap(); // layer: the keys of its spans
let following = true; // whether the end of the text is kept in view while it streams

function paint() {
  const nodes = path();
  const whole = textOf(nodes);
  if (text.value !== whole) text.value = whole;
  paintLayer($("backdrop"), nodes, "A");
  paintTextB();
  $("examples").hidden = whole !== "" || state.running !== null;
}

export function paintTextB() {
  if (state.comparing) paintLayer($("other"), path("B"), "B");
}

// Draws the nodes that differ from those that are drawn: typing in a long text changes few of them.
function paintLayer(layer, nodes, side) {
  const shared = side === "B" ? countShared(nodes) : 0;
  let length = 0;
  const items = nodes.map((node, i) => {
    const isOutside = side === "A" && state.window !== null && length + node.text.length <= state.window.chars;
    const edge = side === "A" && state.window !== null && !isOutside && length < state.window.chars ? state.window.chars - length : 0;
    length += node.text.length;
    const names = [i < shared ? "shared" : node.generated ? "model" : "own", isOutside ? "outside" : "", node === state.selected?.node ? "chosen" : ""];
    const className = names.filter(Boolean).join(" ");
    const shade = node.generated?.logprob == null || i < shared ? "" : shadeOf(node.generated.logprob);
    return { node, className, shade, edge, key: `${className}/${shade}/${edge}/${node.text}` };
  });
  const old = painted.get(layer) ?? [];
  const count = (same) => {
    let n = 0;
    while (n < Math.min(old.length, items.length) && same(n)) n++;
    return n;
  };
  const start = count((n) => old[n] === items[n].key);
  const rest = Math.min(old.length, items.length) - start;
  const end = Math.min(rest, count((n) => old[old.length - 1 - n] === items[items.length - 1 - n].key));
  for (let i = old.length - end - 1; i >= start; i--) layer.children[i].remove();
  const fresh = items.slice(start, items.length - end).map(tokenSpan);
  if (side === "A" && !layer.lastChild) layer.append("\u200b"); // the height of an empty last line
  const before = layer.children[start] ?? (side === "A" ? layer.lastChild : null);
  if (before) before.before(...fresh);
  else layer.append(...fresh);
  painted.set(layer, items.map(({ key }) => key));
}

function countShared(nodes) {
  const other = path("A");
  const i = nodes.findIndex((node, n) => node !== other[n]);
  return i < 0 ? nodes.length : i;
}

// The space before a word has no colour.
function tokenSpan({ node, className, shade, edge }) {
  if (edge) return el("span", { className }, el("s", { className: "outside" }, node.text.slice(0, edge)), node.text.slice(edge));
  if (!shade) return el("span", { className }, node.text);
  const [, space, word] = node.text.match(/^(\s*)([^]*)$/);
  return el("span", { className }, space, el("span", { className: shade }, word));
}

// Draws the text of a side after new tokens, and follows its end.
export function paintNew(side) {
  if (side === "B") paintTextB();
  else {
    text.value = textOf(path());
    paintLayer($("backdrop"), path(), "A");
  }
  const layer = side === "A" ? $("backdrop") : $("other");
  if (following) layer.lastElementChild?.scrollIntoView({ block: "nearest" });
}

export const startFollowing = () => (following = true);

// Scrolls a part of the text into view.
export const showNode = (side, index) => $(side === "A" ? "backdrop" : "other").children[index]?.scrollIntoView({ block: "nearest" });

export function newText() {
  state.running?.abort();
  state.tree = makeTree();
  textReplaced();
  remember("new");
  text.focus();
}

// Replaces the text by an example.
export function setText(example) {
  edit(state.tree, example);
  textReplaced();
  remember("example");
}

export function wireEditor() {
  onRender(paint);
  text.addEventListener("input", () => {
    edit(state.tree, text.value);
    textReplaced();
    remember("typing");
  });
  for (const name of ["wheel", "touchmove"]) document.addEventListener(name, () => (following = false), { passive: true });
  $("new").addEventListener("click", newText);
  for (const button of $("examples").querySelectorAll("[data-text]")) {
    button.addEventListener("click", () => {
      setText(button.dataset.text);
      text.focus();
    });
  }
  document.addEventListener("selectionchange", () => document.activeElement === text && state.running === null && showCaret());
}

// The caret stays in view: the text area itself does not scroll.
function showCaret() {
  if (text.selectionEnd !== text.value.length) return;
  $("backdrop").lastElementChild?.scrollIntoView({ block: "nearest" });
}

