// The chat page: a conversation kept in memory, streamed answers, parameters.
"use strict";

const byId = (id) => document.getElementById(id);
const ui = {
  log: byId("log"), scroller: byId("scroller"), welcome: byId("welcome"), banner: byId("banner"),
  composer: byId("composer"), prompt: byId("prompt"), send: byId("send"), model: byId("model"),
  status: byId("status"), panel: byId("panel"), togglePanel: byId("toggle-panel"),
  template: byId("message-template"), announcer: byId("announcer"),
  ask: byId("ask"), key: byId("key"), refusal: byId("refusal"), forgetKey: byId("forget-key"),
};
const PARAMETERS = ["temperature", "top_p", "max_tokens", "seed"];
const NEAR_BOTTOM_PX = 80;
const STATUS_PERIOD_MS = { ready: 15000, other: 2000 };

// Turns: {role, content, view}; an answer that failed before its first word is not kept.
let conversation = [];
let running = null;

class MessageView {
  constructor(role) {
    this.root = ui.template.content.firstElementChild.cloneNode(true);
    this.role = role;
    this.root.classList.add(role);
    this.root.querySelector("h2").textContent = role === "user" ? "You" : "Answer";
    this.body = this.root.querySelector(".body");
    this.thinking = this.root.querySelector(".thinking");
    this.thoughts = this.root.querySelector(".thoughts");
    this.stats = this.root.querySelector(".stats");
    this.content = "";
    this.reasoning = "";
    this.isScheduled = false;
    this.root.querySelector(".copy").addEventListener("click", (event) =>
      copyText(this.content, event.currentTarget));
    const retry = this.root.querySelector(".retry");
    if (role === "user") retry.remove();
    else retry.addEventListener("click", () => answerAgain(this));
    ui.log.append(this.root);
  }

  setText(text) {
    this.content = text;
    this.body.textContent = text;
  }

  add(reasoning, content) {
    if (reasoning) this.startedThinking ??= performance.now();
    this.reasoning += reasoning;
    this.content += content;
    if (this.isScheduled) return;
    this.isScheduled = true;
    requestAnimationFrame(() => this.paint());
    // A hidden page gets no frames; it is painted all the same.
    if (document.hidden) this.paint();
  }

  paint() {
    this.isScheduled = false;
    const follow = isNearBottom();
    if (this.reasoning.trim()) {
      const isNew = this.thinking.hidden;
      this.thinking.hidden = false;
      if (isNew) this.thinking.open = true;
      Markdown.update(this.thoughts, this.reasoning);
    }
    if (this.content.trim() && this.reasoning && !this.isFolded) this.fold();
    Markdown.update(this.body, this.content);
    if (follow) scrollToBottom();
  }

  fold() {
    this.isFolded = true;
    this.thinking.open = false;
    const spent = duration(performance.now() - this.startedThinking);
    this.thinking.querySelector("summary span").textContent = `Thought for ${spent}`;
  }

  finish(stats, note) {
    this.root.classList.remove("busy");
    this.paint();
    this.stats.textContent = [note, stats].filter(Boolean).join(" · ");
    if (!this.content && !this.reasoning) this.body.append(emptyNote());
  }
}

function emptyNote() {
  const note = document.createElement("p");
  note.className = "empty";
  note.textContent = "No answer.";
  return note;
}

class Stopwatch {
  constructor() {
    this.start = performance.now();
    this.first = null;
    this.last = this.start;
  }

  mark() {
    this.last = performance.now();
    this.first ??= this.last;
  }

  describe(usage) {
    const parts = [];
    const seconds = (this.last - (this.first ?? this.last)) / 1000;
    if (usage) {
      parts.push(`${usage.completion_tokens} ${usage.completion_tokens === 1 ? "token" : "tokens"}`);
      if (usage.completion_tokens > 1 && seconds > 0) {
        parts.push(`${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s`);
      }
    }
    if (this.first !== null) parts.push(`first token ${duration(this.first - this.start)}`);
    return parts.join(" · ");
  }
}

const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
const isNearBottom = () =>
  ui.scroller.scrollHeight - ui.scroller.scrollTop - ui.scroller.clientHeight < NEAR_BOTTOM_PX;
const scrollToBottom = () => { ui.scroller.scrollTop = ui.scroller.scrollHeight; };

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // No clipboard access on plain HTTP from another machine: the old way still works.
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "visually-hidden";
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.classList.add("done");
  ui.announcer.textContent = "Copied";
  setTimeout(() => button.classList.remove("done"), 1500);
}

const endsWithQuestion = () => conversation.at(-1)?.role === "user";

function showError(message) {
  ui.banner.querySelector("p").textContent = message;
  byId("try-again").hidden = !endsWithQuestion();
  ui.banner.hidden = false;
}

function hideError() {
  ui.banner.hidden = true;
}

function requestBody() {
  const body = { messages: [] };
  if (ui.model.value) body.model = ui.model.value;
  const system = byId("system").value.trim();
  if (system) body.messages.push({ role: "system", content: system });
  for (const { role, content } of conversation) body.messages.push({ role, content });
  for (const name of PARAMETERS) {
    const field = byId(name);
    if (field.value.trim() !== "" && Number.isFinite(field.valueAsNumber)) body[name] = field.valueAsNumber;
  }
  return body;
}

function setBusy(isBusy) {
  document.body.classList.toggle("is-busy", isBusy);
  ui.send.setAttribute("aria-label", isBusy ? "Stop" : "Send");
  ui.send.title = isBusy ? "Stop (Esc)" : "Send (Enter)";
  updateSend();
}

function updateSend() {
  ui.send.disabled = !running && !ui.prompt.value.trim();
}

async function answer() {
  hideError();
  const view = new MessageView("assistant");
  view.root.classList.add("busy");
  const watch = new Stopwatch();
  const controller = new AbortController();
  running = controller;
  setBusy(true);
  scrollToBottom();
  let usage = null;
  let note = "";
  let failure = null;
  try {
    for await (const piece of Server.chat(requestBody(), controller.signal)) {
      if (piece.reasoning || piece.content) {
        watch.mark();
        view.add(piece.reasoning, piece.content);
      }
      if (piece.finishReason === "length") note = "cut at the length limit";
      usage = piece.usage ?? usage;
    }
  } catch (error) {
    note = error.name === "AbortError" ? "stopped" : "failed";
    if (note === "failed") failure = error;
  }
  if (running === controller) running = null;
  settle(view, watch.describe(usage), note);
  if (!failure || !(view.root.isConnected || endsWithQuestion())) return;
  if (failure.needsKey) askForKey(failure.message);
  else showError(failure instanceof Server.ServerError ? failure.message : String(failure));
}

function settle(view, stats, note) {
  // A new chat may have been started meanwhile: then this view is no longer shown.
  const isShown = view.root.isConnected;
  if (isShown && note === "failed" && !view.content && !view.reasoning) view.root.remove();
  else if (isShown) {
    view.finish(stats, note);
    if (view.content) conversation.push({ role: "assistant", content: view.content, view });
    ui.announcer.textContent = view.content;
  }
  setBusy(Boolean(running));
  if (isNearBottom()) scrollToBottom();
}

function submit(text) {
  const content = text.trim();
  if (!content || running) return;
  // A question whose answer failed is asked again together with the new words.
  const view = new MessageView("user");
  view.setText(content);
  conversation.push({ role: "user", content, view });
  ui.welcome.hidden = true;
  ui.prompt.value = "";
  fitPrompt();
  answer();
}

function answerAgain(view) {
  if (running) return;
  const place = conversation.findIndex((turn) => turn.view === view);
  const removed = place < 0 ? [] : conversation.splice(place);
  for (const turn of removed) turn.view.root.remove();
  view.root.remove();
  if (conversation.length) answer();
}

function stop() {
  running?.abort();
}

function newChat() {
  stop();
  running = null;
  conversation = [];
  ui.log.replaceChildren();
  ui.welcome.hidden = false;
  hideError();
  setBusy(false);
  ui.prompt.focus();
}

function fitPrompt() {
  ui.prompt.style.height = "auto";
  ui.prompt.style.height = `${ui.prompt.scrollHeight}px`;
  updateSend();
}

function togglePanel(isOpen = ui.panel.hidden) {
  ui.panel.hidden = !isOpen;
  ui.togglePanel.setAttribute("aria-expanded", String(isOpen));
  document.body.classList.toggle("has-panel", isOpen);
}

function switchTheme() {
  const root = document.documentElement;
  const isDark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
  try {
    localStorage.setItem("xeray-theme", root.dataset.theme);
  } catch {
    // The choice then lasts as long as the page.
  }
}

function askForKey(message) {
  // Whoever has not given a key yet needs no reproach.
  ui.refusal.textContent = Server.hasKey() ? message : "";
  hideError();
  ui.composer.hidden = true;
  ui.forgetKey.hidden = true;
  if (!ui.ask.hidden) return;
  ui.ask.hidden = false;
  ui.key.focus();
}

async function useKey(key) {
  if (!key) return;
  Server.setKey(key);
  await loadModels().catch((error) => { ui.refusal.textContent = error.message; });
  if (ui.ask.hidden && endsWithQuestion() && !running) answer();
}

function forgetKey() {
  Server.setKey("");
  newChat();
  ui.model.replaceChildren();
  loadModels().catch(() => {});
}

async function loadModels() {
  let models;
  try {
    models = await Server.models();
  } catch (error) {
    if (error.needsKey) askForKey(error.message);
    throw error;
  }
  ui.forgetKey.hidden = !Server.hasKey();
  if (!ui.ask.hidden) {
    ui.ask.hidden = true;
    ui.key.value = "";
    ui.composer.hidden = false;
    ui.prompt.focus();
  }
  const chosen = ui.model.value;
  ui.model.replaceChildren(...models.map(({ id }) => new Option(id, id)));
  if (models.some(({ id }) => id === chosen)) ui.model.value = chosen;
}

async function watchStatus() {
  const status = await Server.status();
  ui.status.dataset.state = status;
  ui.status.title = status;
  ui.status.setAttribute("aria-label", `Server: ${status}`);
  // While a key is asked for, whoever types it asks.
  if (!ui.model.options.length && ui.ask.hidden) await loadModels().catch(() => {});
  setTimeout(watchStatus, STATUS_PERIOD_MS[status] ?? STATUS_PERIOD_MS.other);
}

ui.composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) stop();
  else submit(ui.prompt.value);
});
ui.prompt.addEventListener("input", fitPrompt);
ui.prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit(ui.prompt.value);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) stop();
  else if (!ui.panel.hidden) togglePanel(false);
});
ui.log.addEventListener("click", (event) => {
  const button = event.target.closest(".copy-code");
  if (button) copyText(button.closest(".code").querySelector("pre").textContent, button);
});
ui.welcome.addEventListener("click", (event) => {
  const idea = event.target.closest(".ideas button");
  if (idea) submit(idea.textContent);
});
byId("dismiss").addEventListener("click", hideError);
byId("try-again").addEventListener("click", () => {
  if (!running && endsWithQuestion()) answer();
});
byId("new-chat").addEventListener("click", newChat);
byId("theme").addEventListener("click", switchTheme);
ui.togglePanel.addEventListener("click", () => togglePanel());
byId("close-panel").addEventListener("click", () => togglePanel(false));
byId("reset").addEventListener("click", () => {
  for (const name of [...PARAMETERS, "system"]) byId(name).value = "";
});
ui.ask.addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(ui.key.value.trim());
});
ui.forgetKey.addEventListener("click", forgetKey);
fitPrompt();
watchStatus();
