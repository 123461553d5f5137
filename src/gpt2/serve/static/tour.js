// A tour of one minute: six steps, each beside the part of the page that it is about. It is offered once.

import { $, button, clamp, el } from "./dom.js";
import { setText } from "./editor.js";
import { continueText } from "./generation.js";
import { path, render, state } from "./state.js";
import { read, write } from "./share.js";

const SEEN = "gpt2-tour"; // in the browser's storage: that it was finished or skipped
const EXAMPLE = "The history of the city began when";

const openTab = (tab) => () => {
  state.tab = tab;
  render();
};

const STEPS = [
  { at: ".sheets", title: "A text", text: "Write the beginning of a text, or take an example. The model only sees it as tokens, which are words or parts of words.", enter: () => path().length || setText(EXAMPLE) },
  { at: "#panel-settings", title: "The next token", text: "For every text the model gives each token of its vocabulary a probability. The sliders change them; click a bar to insert its token.", enter: openTab("settings") },
  { at: ".actions", title: "Continue", text: "The model draws a token, adds it to the text, and begins again. Its own tokens are underlined, and the darker, the less likely they were. Click one to see what else it could have been.", enter: () => path().some(({ generated }) => generated) || continueText() },
  { at: "#panel-attention", title: "Attention", text: "A head moves information between tokens. See which tokens each head looks at, at one position or as a whole matrix.", enter: openTab("attention") },
  { at: "#panel-contributions", title: "What did it", text: "Each head and MLP adds to the logit of a token or takes from it. The layers show when the answer appears.", enter: openTab("contributions") },
  { at: "#panel-whatif", title: "What if", text: "Switch parts off, take activations from another text, or steer. Share copies a link, code, or the whole page as one file.", enter: openTab("whatif") },
];

let step = 0, back = null;

function show(to) {
  document.querySelector(".toured")?.classList.remove("toured");
  if (!STEPS[to]) return end();
  step = to;
  const { at, title, text, enter } = STEPS[step], box = $("tour");
  enter();
  const isLast = step === STEPS.length - 1;
  const next = button(isLast ? "Done" : "Next", () => show(step + 1), { className: "main" });
  const row = el("div", { className: "row" }, el("span", { className: "quiet" }, `${step + 1} of ${STEPS.length}`), button("Skip", end, { className: "plain" }), ...(step ? [button("Back", () => show(step - 1))] : []), next);
  box.replaceChildren(el("h2", { id: "tour-title" }, title), el("p", {}, text), row);
  box.hidden = false;
  const target = document.querySelector(at);
  target.classList.add("toured");
  target.scrollIntoView({ block: "nearest" });
  place(box, target.getBoundingClientRect());
  next.focus({ preventScroll: true });
}

// Beside the target where there is room, else over its end.
function place(box, rect) {
  const { offsetWidth: width, offsetHeight: height } = box, gap = 12;
  const left = rect.left > width + 2 * gap ? rect.left - width - gap : clamp(rect.left, gap, innerWidth - width - gap);
  const top = clamp(rect.left > width + 2 * gap ? rect.top : rect.bottom + gap, gap, innerHeight - height - gap);
  box.style.left = `${left}px`;
  box.style.top = `${top}px`;
}

function end() {
  document.querySelector(".toured")?.classList.remove("toured");
  $("tour").hidden = true;
  forget();
  (back?.isConnected && back.checkVisibility() ? back : $("text")).focus();
}

function forget() {
  write(SEEN, true);
  $("invite").hidden = true;
}

function begin(event) {
  back = event.currentTarget;
  show(0);
}

export function wireTour() {
  $("invite").hidden = read(SEEN, false) === true;
  for (const id of ["open-tour", "take-tour"]) $(id).addEventListener("click", begin);
  $("skip-tour").addEventListener("click", () => {
    forget();
    $("text").focus();
  });
  $("tour").addEventListener("keydown", (event) => {
    const to = { ArrowRight: step + 1, ArrowLeft: Math.max(0, step - 1), Escape: Infinity }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    show(to);
  });
}
