// Requests to the server: JSON, and server-sent events.

export class ApiError extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    Object.assign(this, { status, retryAfter });
  }
}

const KEY = "gpt2-key";
let keyInMemory = ""; // used where the browser has no session storage

const storage = () => {
  try {
    return window.sessionStorage;
  } catch {
    return null;
  }
};

const currentKey = () => storage()?.getItem(KEY) ?? keyInMemory;

export const setKey = (key) => {
  keyInMemory = key;
  storage()?.setItem(KEY, key);
};
export const hasKey = () => Boolean(currentKey());

export async function requestJson(path, body, signal) {
  const response = await request(path, body, signal);
  return response.json();
}

async function request(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const key = currentKey();
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = body === undefined ? { headers, signal } : { method: "POST", headers, signal, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not respond. Is gpt2 serve still running?");
  }
  if (!response.ok) throw await responseError(response);
  return response;
}

async function responseError(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server responded with status ${response.status}.`;
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
    if (done) throw new ApiError("The connection was lost before the text was complete.");
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
    throw new ApiError("The connection was lost before the text was complete.");
  }
}

function dataOf(block) {
  const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
}

// A debounced function: runs the latest call after a pause, and aborts the one before it.
export function runLatest(pause, work) {
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
