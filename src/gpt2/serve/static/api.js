// What the page asks the server: JSON, and a stream of events.

export class ApiError extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    Object.assign(this, { status, retryAfter });
  }
}

const KEY = "gpt2-key";
let held = ""; // where the browser lets pages keep nothing

const storage = () => {
  try {
    return window.sessionStorage;
  } catch {
    return null;
  }
};

const keyGiven = () => storage()?.getItem(KEY) ?? held;

export const useKey = (key) => {
  held = key;
  storage()?.setItem(KEY, key);
};
export const hasKey = () => Boolean(keyGiven());

export async function ask(path, body, signal) {
  const response = await request(path, body, signal);
  return response.json();
}

async function request(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const key = keyGiven();
  if (key) headers.Authorization = `Bearer ${key}`;
  const how = body === undefined ? { headers, signal } : { method: "POST", headers, signal, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, how);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is gpt2 serve still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const told = await response.json().catch(() => null);
  const message = told?.error?.message ?? `The server said ${response.status}.`;
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  if (response.status !== 429) return new ApiError(message, response.status, retryAfter);
  const when = retryAfter ? `Try again in ${retryAfter} s.` : "Try again in a moment.";
  return new ApiError(`The server is busy: ${message} ${when}`, 429, retryAfter);
}

// Yields the JSON of each event until [DONE].
export async function* events(path, body, signal) {
  const response = await request(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await read(reader);
    if (done) throw new ApiError("The server went away in the middle of the text.");
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const data of blocks.map(dataOf)) {
      if (data === "[DONE]") return;
      if (data === "") continue;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error.message);
      yield event;
    }
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server went away in the middle of the text.");
  }
}

function dataOf(block) {
  const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
}

// Runs only the latest of what it is given, after a pause; what is under way is given up.
export function latest(pause, work) {
  let timer, controller;
  return (...args) => {
    clearTimeout(timer);
    controller?.abort();
    timer = setTimeout(async () => {
      controller = new AbortController();
      const { signal } = controller;
      try {
        await work(signal, ...args);
      } catch (error) {
        if (!signal.aborted) throw error;
      }
    }, pause);
  };
}
