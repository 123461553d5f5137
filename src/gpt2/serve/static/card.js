// The card of a token: its alternatives, each of which starts another branch.

import { ApiError } from "./api.js";
import { $ } from "./dom.js";
import { fillCard, placeCard } from "./bars.js";
import { runLatestAndReport, showError } from "./notice.js";
import { requestNextTokens } from "./request.js";
import { render, onRender, path, infoOf, sidesShown, state } from "./state.js";
import { hasVocabulary, tokensOf } from "./tokens.js";
import { add, goTo, spansOf } from "./tree.js";
import { run } from "./generation.js";

const text = $("text"), card = $("alternatives");
let back = text; // what gets the focus when the card is closed

// selected: as in the state; nodes: returns the path of the tokens before it; opener: the element of the token.
export const openCard = runLatestAndReport(0, async (signal, { selected, nodes, opener, keyboard = true }) => {
  const rect = [...opener.getClientRects()].at(-1) ?? text.getBoundingClientRect();
  const { side, before, token } = selected;
  const result = await requestNextTokens(side, before, { top: 10, asked: token.id }, signal);
  state.selected = selected;
  if (state.comparing) state.shown = side;
  render();
  const more = { Attention: () => openTab("attention"), Layers: () => openTab("layers") };
  fillCard(card, result, token.text, { pick: (other) => startBranch(side, nodes(), other), more, close: hideCard });
  placeCard(card, rect);
  back = opener.matches("button") && opener.isConnected ? opener : text;
  if (keyboard) card.querySelector("button").focus();
});

export function hideCard() {
  if (card.hidden) return;
  if (card.contains(document.activeElement)) (back.isConnected ? back : text).focus();
  card.hidden = true;
}

function openTab(tab) {
  state.tab = tab;
  render();
  $(`tab-${tab}`).focus();
}

export function nodeOf(name, { id, text: word, raw }) {
  return [word, { id, logprob: Math.log(Math.max(raw, 1e-30)), vocabulary: infoOf(state.sides[name].model).fingerprint }];
}

// Adds another token after some nodes, and generates from there.
function startBranch(name, nodes, token) {
  const leaf = add(nodes.at(-1) ?? state.tree.root, ...nodeOf(name, token));
  if (name === "A") {
    goTo(state.tree, leaf);
    text.focus();
  } else hideCard();
  run({ [name]: leaf });
}

// Opens the card of a token of a side.
async function openCardOf(name, i, opener, keyboard) {
  const nodes = path(name), info = infoOf(state.sides[name].model);
  if (!hasVocabulary(nodes[i], info)) return showError(new ApiError("This token is from a model with another vocabulary."), hideCard);
  const before = nodes.slice(0, i), { generated, text: word } = nodes[i];
  try {
    const tokens = await tokensOf(before, info);
    const selected = { side: name, node: nodes[i], before: tokens, token: { id: generated.id, text: word } };
    openCard({ selected, nodes: () => before, opener, keyboard });
  } catch (error) {
    showError(error, () => openCardOf(name, i, opener, keyboard));
  }
}

// Opens the card of the token at an offset of the text; with the keyboard also of the token that ends there.
function openCardAt(offset, keyboard) {
  const spans = spansOf(path());
  const at = spans.findIndex(({ node, start, end }) => node.generated && start <= offset && offset < end);
  const i = at < 0 && keyboard ? spans.findLastIndex(({ node, end }) => node.generated && end === offset) : at;
  if (i < 0) return hideCard();
  openCardOf("A", i, $("backdrop").children[i], keyboard);
}

let subject = null; // what the card is about

// Hides the card once the text, the settings or the panel is another one; new log-probabilities alone leave it.
function hideOther() {
  const now = [state.tree.leaf, state.leafB, state.selected?.node, state.running, state.tab, state.shown];
  const settings = JSON.stringify(state.sides);
  if (subject && subject.settings === settings && now.every((value, i) => value === subject.now[i])) return;
  subject = { now, settings };
  hideCard();
}

const isReady = () => !state.running && state.models.length > 0;

export function wireCard() {
  onRender(hideOther);
  text.addEventListener("click", () => {
    if (isReady() && text.selectionStart === text.selectionEnd) openCardAt(text.selectionStart, false);
  });
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !event.altKey || !isReady()) return;
    event.preventDefault();
    openCardAt(text.selectionStart, true);
  });
  $("other").addEventListener("click", (event) => {
    const i = [...$("other").children].findIndex((span) => span.contains(event.target));
    if (i >= 0 && isReady() && sidesShown().includes("B") && path("B")[i].generated) openCardOf("B", i, $("other").children[i], false);
  });
  document.addEventListener("pointerdown", (event) => {
    if (!card.contains(event.target)) hideCard();
  });
}
