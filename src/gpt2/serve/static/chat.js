// A conversation with a model that has a chat template, over the chat API.

import { events } from "./api.js";
import { button, el } from "./dom.js";
import { clearNotice, showError } from "./notice.js";
import { fieldsOf } from "./request.js";
import { infoOf, state } from "./state.js";

const turns = []; // {role, content, element}
let running = null; // the AbortController of the answer

export const hasChat = (name) => infoOf(name)?.has_chat_template ?? false;

export function fillChat(panel) {
  if (panel.children.length) return;
  const log = el("ol", { className: "chat" });
  const input = el("textarea", { id: "chat-text", rows: 2, placeholder: "Your message" });
  const send = el("button", { type: "submit", className: "main" }, "Send");
  const stop = button("Stop", () => running?.abort(), { hidden: true });
  const clear = button("New conversation", () => {
    running?.abort();
    turns.length = 0;
    log.replaceChildren();
    input.focus();
  }, { className: "plain" });
  const form = el("form", { className: "view" }, el("label", { htmlFor: "chat-text", className: "hidden" }, "Message"), input, el("div", { className: "row" }, send, stop, clear));
  const mark = () => {
    send.disabled = running !== null;
    stop.hidden = running === null;
  };
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running || !input.value.trim()) return;
    add(log, "user", input.value.trim());
    input.value = "";
    await answer(log, mark);
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  panel.replaceChildren(el("div", { role: "log", "aria-label": "Conversation" }, log), form);
}

function add(log, role, content) {
  const text = el("span", { className: role === "user" ? "own" : "model" }, content);
  const turn = { role, content, text };
  turns.push(turn);
  log.append(el("li", { className: role }, el("b", {}, role === "user" ? "You" : "Model"), text));
  return turn;
}

async function answer(log, mark) {
  const side = state.sides[state.shown], messages = turns.map(({ role, content }) => ({ role, content }));
  running = new AbortController();
  const { signal } = running;
  clearNotice();
  mark();
  const turn = add(log, "assistant", "");
  try {
    const body = { model: side.model, messages, stream: true, ...(await fieldsOf(side, signal)) };
    for await (const { choices } of events("v1/chat/completions", body, signal)) {
      turn.content += choices[0]?.delta?.content ?? "";
      turn.text.textContent = turn.content;
      turn.text.scrollIntoView({ block: "nearest" });
    }
  } catch (error) {
    if (!turn.content) {
      turn.text.parentElement.remove();
      if (turns.includes(turn)) turns.splice(turns.indexOf(turn), 1);
    }
    if (!signal.aborted) showError(error, () => answer(log, mark));
  } finally {
    running = null;
    mark();
  }
}
