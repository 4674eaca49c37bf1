// Reads the server's event stream and turns every failure into one line a person can read.
"use strict";

const Server = (() => {
  const KEY_NAME = "xeray-key";

  class ServerError extends Error {
    // `status` is 0 where nobody answered.
    constructor(message, status = 0) {
      super(message);
      this.needsKey = status === 401 || status === 403;
    }
  }

  // The API key lives as long as this tab, in its session storage and nowhere else.
  let key = "";
  try {
    key = sessionStorage.getItem(KEY_NAME) || "";
  } catch {
    // Storage may be closed to this page; the key then lasts as long as the page.
  }

  function setKey(chosen) {
    key = chosen;
    try {
      if (key) sessionStorage.setItem(KEY_NAME, key);
      else sessionStorage.removeItem(KEY_NAME);
    } catch {
      // As above.
    }
  }

  const hasKey = () => Boolean(key);

  async function failure(response) {
    try {
      const body = await response.json();
      if (body.error && body.error.message) return new ServerError(body.error.message, response.status);
    } catch {
      // Not JSON: something in front of the server answered.
    }
    return new ServerError(`The server answered with status ${response.status}.`, response.status);
  }

  async function call(path, options) {
    const headers = key ? { ...options.headers, Authorization: `Bearer ${key}` } : options.headers;
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server cannot be reached. Is it still running?");
    }
    if (!response.ok) throw await failure(response);
    return response;
  }

  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let pending = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      pending += value;
      const parts = pending.split("\n\n");
      pending = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  }

  // Yields {reasoning, content, finishReason, usage}; throws ServerError, or AbortError when stopped.
  async function* chat(body, signal) {
    const response = await call("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
    let isComplete = false;
    for await (const data of events(response)) {
      if (data === "[DONE]") {
        isComplete = true;
        break;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message);
      const choice = chunk.choices[0];
      const delta = choice ? choice.delta : {};
      yield {
        reasoning: delta.reasoning_content || delta.reasoning || "",
        content: delta.content || "",
        finishReason: choice ? choice.finish_reason : null,
        usage: chunk.usage || null,
      };
    }
    if (!isComplete) throw new ServerError("The connection was cut before the answer was complete.");
  }

  async function models() {
    const response = await call("v1/models", { cache: "no-store" });
    return (await response.json()).data;
  }

  // Returns "ready" or why not; never throws.
  async function status() {
    try {
      const response = await fetch("health", { cache: "no-store" });
      return (await response.json()).status || "unreachable";
    } catch {
      return "unreachable";
    }
  }

  return { ServerError, chat, hasKey, models, setKey, status };
})();
