// The text area, and behind it the colours of the generated tokens.

import { $, el, shadeOf } from "./dom.js";
import { textReplaced, onRender, path, state } from "./state.js";
import { edit, pathTo, textOf } from "./tree.js";

const text = $("text");

function paint() {
  const nodes = path();
  const whole = textOf(nodes);
  if (text.value !== whole) text.value = whole;
  $("backdrop").replaceChildren(...nodes.map(tokenSpan), "\u200b");
  paintTextB();
}

// The space before a word has no colour.
function tokenSpan({ text: words, generated }) {
  if (generated?.logprob == null) return el("span", {}, words);
  const [, space, word] = words.match(/^(\s*)([^]*)$/);
  return el("span", {}, space, el("span", { className: shadeOf(generated.logprob) }, word));
}

// Appends one token without a full render.
export function paintNew(node) {
  text.value += node.text;
  $("backdrop").lastChild.before(tokenSpan(node));
}

export function paintTextB() {
  if (!state.comparing) return;
  const shared = state.begin ? pathTo(state.begin) : path();
  $("other").replaceChildren(el("span", { className: "shared" }, textOf(shared)), ...state.other.map(tokenSpan));
}

export function wireEditor() {
  onRender(paint);
  text.addEventListener("input", () => {
    edit(state.tree, text.value);
    textReplaced();
  });
}
