// Calls of the server's API.

import { ServerError } from "./errors.js";
import { askForKey } from "./key.js";

const RETRIES = 5;

export const pause = (seconds, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });

async function errorOf(response) {
  try {
    const { error } = await response.json();
    return new ServerError(error.message, error.param);
  } catch {
    return new ServerError(`The server answered ${response.status} ${response.statusText}.`, null);
  }
}

// Call the API. Open the key dialog on 401; on 429 and 503, retry after the time in Retry-After.
export async function call(path, options = {}, onWait = () => {}) {
  for (let attempt = 0; ; attempt += 1) {
    const key = sessionStorage.getItem("key");
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server cannot be reached.", null);
    }
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status === 401) {
      // Another call may have received a key in the meantime.
      if (key === sessionStorage.getItem("key")) await askForKey(key ? error.message : "");
      options.signal?.throwIfAborted();
      continue;
    }
    const seconds = Number(response.headers.get("Retry-After"));
    if (![429, 503].includes(response.status) || !seconds || attempt >= RETRIES) throw error;
    for (let left = seconds; left > 0; left -= 1) {
      onWait(`${error.message} Trying again in ${left} s.`);
      await pause(Math.min(1, left), options.signal);
    }
  }
}

// Yield the data of server-sent events. Comments, which keep the connection alive, have none.
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text = (text + value).replaceAll("\r\n", "\n");
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const lines = text.slice(0, end).split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) yield JSON.parse(lines.map((line) => line.slice(5)).join("\n"));
    }
  }
}
