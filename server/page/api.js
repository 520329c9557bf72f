// Talking to the server: its API key, its errors, and its event streams.

const KEY = "fen.key";
let asking = null; // the promise of the open key dialog
let declined = false; // asked and refused: not again until something is sent

export class ApiError extends Error {
  constructor(message, status, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

// Calls `path` and resolves to the Response of a success. Throws ApiError with the server's own sentence.
// A 401 asks for the key, once for all calls that wait; `insist` asks even if the user has just declined.
export async function call(path, options = {}, insist = false) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers };
    if (key) headers.Authorization = "Bearer " + key;
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server does not answer. Is it running?", 0);
    }
    if (response.ok) return response;
    if (response.status === 401 && (insist || !declined) && (await askKey(key))) continue;
    throw await asError(response);
  }
}

async function asError(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message || `the server answered ${response.status}`;
  return new ApiError(sentence(message), response.status, Number(response.headers.get("retry-after")) || 0);
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (/[.?!]$/.test(text) ? "" : ".");

// Opens the dialog; resolves to whether there is a new key. Callers that come meanwhile get the same answer.
function askKey(used) {
  if (sessionStorage.getItem(KEY) !== used) return true; // another call has asked
  if (asking) return asking;
  const dialog = document.getElementById("key");
  const input = document.getElementById("key-input");
  document.getElementById("key-why").textContent = used
    ? "The server did not accept this key."
    : "This server answers only those who have a key.";
  input.value = "";
  dialog.returnValue = "";
  asking = new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "use" && input.value.trim();
      declined = !given;
      if (given) sessionStorage.setItem(KEY, given);
      input.value = "";
      asking = null;
      resolve(Boolean(given));
    }, { once: true });
  });
  dialog.showModal();
  return asking;
}

export function setUpKeyDialog() {
  const dialog = document.getElementById("key");
  document.getElementById("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    dialog.close("use");
  });
  document.getElementById("key-cancel").addEventListener("click", () => dialog.close(""));
}

// The events of a chat completion as they come. Throws ApiError, also for an error in the middle.
export async function* streamChat(body, signal) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  }, true);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let ended = false;
  while (!ended) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The connection broke while the answer was coming.", 0);
    }
    if (piece.done) break;
    buffer += piece.value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue; // a comment that keeps the connection alive
      const data = event.slice(6);
      if (data === "[DONE]") {
        ended = true;
        break;
      }
      const parsed = JSON.parse(data);
      if (parsed.error) throw new ApiError(sentence(parsed.error.message), parsed.error.code || 500);
      yield parsed;
    }
  }
  if (!ended) throw new ApiError("The connection broke while the answer was coming.", 0);
}
