// The text, and behind it the colours of what was said.

import { $, el, shadeOf } from "./dom.js";
import { moved, onChange, path, state } from "./state.js";
import { edit, pathTo, textOf } from "./tree.js";

const text = $("text");

function paint() {
  const nodes = path();
  const whole = textOf(nodes);
  if (text.value !== whole) text.value = whole;
  $("backdrop").replaceChildren(...nodes.map(inked), "\u200b");
  paintOther();
}

// The space before a word stays blank.
function inked({ text: words, said }) {
  if (said?.logprob == null) return el("span", {}, words);
  const [, space, word] = words.match(/^(\s*)([^]*)$/);
  return el("span", {}, space, el("span", { className: shadeOf(said.logprob) }, word));
}

// Only what is new.
export function paintNew(node) {
  text.value += node.text;
  $("backdrop").lastChild.before(inked(node));
}

export function paintOther() {
  if (!state.comparing) return;
  const shared = state.begin ? pathTo(state.begin) : path();
  $("other").replaceChildren(el("span", { className: "shared" }, textOf(shared)), ...state.other.map(inked));
}

export function wireEditor() {
  onChange(paint);
  text.addEventListener("input", () => {
    edit(state.tree, text.value);
    moved();
  });
}
