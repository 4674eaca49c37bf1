// Shows status.json, asked for again and again while the page is in view; built from DOM nodes only.
"use strict";

(() => {
  const PERIOD_MS = 2000;
  const STATES = {
    ready: "All is well", loading: "The model is loading", draining: "Draining", stuck: "A replica is stuck",
    dead: "The replicas are dead", no_replica: "No replica is up", unreachable: "The service does not answer",
  };
  const byId = (id) => document.getElementById(id);
  let key = "";
  try {
    // The chat page's key may do, where its holder may watch too.
    key = sessionStorage.getItem("xeray-status-key") || sessionStorage.getItem("xeray-key") || "";
  } catch {
    // Storage may be closed to this page; the key is then asked for at each visit.
  }

  function element(name, className, text) {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  const seconds = (value) => value === null || value === undefined ? "–"
    : value < 0.0995 ? `${(value * 1000).toPrecision(2)} ms` : value < 0.9995 ? `${Math.round(value * 1000)} ms` : `${value.toPrecision(3)} s`;
  const number = (value) => value >= 100 ? Math.round(value).toLocaleString("en") : Number(value.toPrecision(2)).toString();
  const percent = (share) => `${Math.round(share * 100)} %`;
  const gigabytes = (bytes) => (bytes / 2 ** 30).toFixed(bytes < 10 * 2 ** 30 ? 1 : 0);
  const latest = (values) => values.findLast((value) => value !== null);

  function span(total) {
    const units = [[86400, "d"], [3600, "h"], [60, "min"]];
    for (const [size, unit] of units) if (total >= size) return `${Math.floor(total / size)} ${unit}`;
    return `${Math.floor(total)} s`;
  }

  function sparkline(svg, values, label) {
    const width = 120, height = 44;
    const top = Math.max(...values.map((value) => value ?? 0)) || 1;
    const at = (value, index) => `${(index / (values.length - 1) * width).toFixed(1)},${(height - 2 - value / top * (height - 6)).toFixed(1)}`;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-label", label);
    // Where nothing was there is no line; a lone value is drawn as a short one.
    const runs = [];
    values.forEach((value, index) => {
      if (value === null) return;
      if (index && values[index - 1] !== null) runs.at(-1).push([value, index]);
      else runs.push([[value, index]]);
    });
    const line = runs.map((run) => {
      const points = run.length > 1 ? run : [[run[0][0], run[0][1] - 0.4], [run[0][0], run[0][1] + 0.4]];
      return `M${points.map(([value, index]) => at(value, index)).join("L")}`;
    });
    const area = runs.filter((run) => run.length > 1).map((run) => {
      const points = run.map(([value, index]) => at(value, index)).join("L");
      const [left, right] = [run[0][1], run.at(-1)[1]].map((index) => (index / (values.length - 1) * width).toFixed(1));
      return `M${points}L${right},${height}L${left},${height}Z`;
    });
    const paths = [["area", area], ["line", line]].map(([name, parts]) => {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("class", name);
      path.setAttribute("d", parts.join(""));
      return path;
    });
    svg.replaceChildren(...paths);
  }

  function meter(name, share, text) {
    const row = element("div", share > 0.9 ? "meter high" : "meter");
    const bar = element("progress");
    bar.max = 1;
    bar.value = Math.min(1, share);
    bar.setAttribute("aria-label", name);
    row.append(element("span", "", name), bar, element("span", "", text ?? percent(share)));
    return row;
  }

  function card(title, what, detail, state) {
    const box = element("article", "card");
    const head = box.appendChild(element("h3"));
    if (state) {
      const dot = head.appendChild(element("span", "dot"));
      dot.dataset.state = state;
    }
    head.append(element("span", "", title), element("span", "what", what));
    if (detail) box.append(element("p", "", detail));
    return box;
  }

  function facts(box, entries) {
    const list = element("ul", "facts");
    for (const [text, className] of entries) if (text) list.append(element("li", className || "", text));
    if (list.childElementCount) box.append(list);
  }

  function replicaCard(replica) {
    const box = card(replica.replica_id, replica.state, replica.device, replica.state);
    if (replica.detail) box.append(element("p", "bad", replica.detail));
    const running = Math.min(replica.num_streams, replica.max_num_seqs);
    box.append(meter("Streams", replica.num_streams / replica.max_num_seqs, `${running} of ${replica.max_num_seqs}`));
    if (replica.kv_usage !== null) box.append(meter("KV cache", replica.kv_usage));
    const waiting = replica.num_streams - running;
    facts(box, [
      [replica.engine && `engine ${replica.engine}${replica.engine_reason && `, because ${replica.engine_reason}`}`],
      [waiting > 0 ? `${waiting} waiting` : "", "warn"],
      [replica.num_waiting_tokens > 0 ? `${number(replica.num_waiting_tokens)} prompt tokens to go` : ""],
      [replica.ttft_p95_s > 0 ? `first token ${seconds(replica.ttft_p95_s)} (p95)` : ""],
      [replica.last_progress_age_s > 5 && replica.num_streams ? `no progress for ${span(replica.last_progress_age_s)}` : "", "warn"],
    ]);
    return box;
  }

  function hostCards(host) {
    const used = host.memory_total_bytes - host.memory_available_bytes;
    const box = card(host.name, "processor", "");
    if (host.cpu_utilization !== null) box.append(meter("Busy", host.cpu_utilization));
    if (host.memory_total_bytes) {
      box.append(meter("Memory", used / host.memory_total_bytes, `${gigabytes(used)} of ${gigabytes(host.memory_total_bytes)} GiB`));
    }
    return [box, ...host.cards.map(gpuCard)];
  }

  function gpuCard(gpu) {
    const box = card(gpu.name, gpu.label, "");
    if (gpu.utilization !== null) box.append(meter("Busy", gpu.utilization));
    if (gpu.memory_total_bytes) {
      const text = `${gigabytes(gpu.memory_used_bytes)} of ${gigabytes(gpu.memory_total_bytes)} GiB`;
      box.append(meter("Memory", gpu.memory_used_bytes / gpu.memory_total_bytes, text));
    }
    facts(box, [
      [gpu.power_w === null ? "" : `${Math.round(gpu.power_w)} W`],
      [gpu.temperature_c === null ? "" : `${Math.round(gpu.temperature_c)} °C`],
      [gpu.throttled_by.length ? `held down by ${gpu.throttled_by.join(", ")}` : "", "warn"],
    ]);
    return box;
  }

  function errorTable(errors) {
    if (!errors.length) return element("p", "empty", "None.");
    const table = element("table");
    const head = table.appendChild(element("thead")).appendChild(element("tr"));
    for (const name of ["Time", "Status", "Kind", "Where", "Request"]) head.append(element("th", "", name));
    const body = table.appendChild(element("tbody"));
    for (const error of errors) {
      const row = body.appendChild(element("tr", error.status >= 500 ? "server" : ""));
      row.append(
        element("td", "", new Date(error.at_s * 1000).toLocaleTimeString()), element("td", "number", error.status),
        element("td", "", error.code), element("td", "", error.endpoint), element("td", "id", error.request_id),
      );
    }
    return table;
  }

  function tile(name, value, values, label) {
    byId(name).textContent = value;
    sparkline(byId(`${name}-line`), values, `${label}, last five minutes: now ${value}`);
  }

  function show(data) {
    byId("ask").hidden = byId("trouble").hidden = true;
    byId("content").hidden = false;
    byId("dot").dataset.state = data.status;
    const ready = data.replicas.filter((replica) => replica.state === "ready").length;
    const isPartly = data.status === "ready" && ready < data.replicas.length;
    if (isPartly) byId("dot").dataset.state = "loading";
    byId("state").textContent = isPartly
      ? `${ready} of ${data.replicas.length} replicas ready` : STATES[data.status] || data.status;
    document.title = `XeRay: ${data.status}`;
    byId("lead").textContent = [
      data.models.join(", "), `${data.in_flight} in flight`, `up ${span(data.uptime_s)}`, `version ${data.version}`,
    ].filter(Boolean).join(" · ");
    const { history } = data;
    tile("ttft", seconds(latest(history.ttft_p95_s)), history.ttft_p95_s, "Time to first token");
    tile("tpot", seconds(latest(history.tpot_p95_s)), history.tpot_p95_s, "Time per token");
    tile("requests", `${number(history.requests_per_s.at(-1))} /s`, history.requests_per_s, "Answers per second");
    tile("tokens", `${number(history.tokens_per_s.at(-1))} /s`, history.tokens_per_s, "Tokens per second");
    const replicas = data.replicas.map(replicaCard);
    byId("replicas").replaceChildren(...(replicas.length ? replicas : [element("p", "empty", "None.")]));
    byId("host").replaceChildren(...hostCards(data.host));
    const served = Object.entries(data.served_by);
    byId("served").textContent = served.map(([by, count]) => `${by === "local" ? "this service" : "the fallback"}: ${count.toLocaleString("en")}`).join(" · ") || "Nothing yet.";
    byId("served").className = served.length ? "" : "empty";
    byId("errors").replaceChildren(errorTable(data.errors));
  }

  function askForKey(message) {
    byId("content").hidden = true;
    byId("state").textContent = "Key needed";
    delete byId("dot").dataset.state;
    byId("refusal").textContent = message;
    if (byId("ask").hidden) {
      byId("ask").hidden = false;
      byId("key").focus();
    }
  }

  function trouble(message) {
    byId("trouble").textContent = message;
    byId("trouble").hidden = false;
    byId("dot").dataset.state = "unreachable";
  }

  async function update() {
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    let response, data;
    try {
      response = await fetch("status.json", { headers, cache: "no-store" });
      data = await response.json();
    } catch {
      byId("state").textContent = STATES.unreachable;
      trouble("The server cannot be reached. What is shown is old; the page keeps trying.");
      return;
    }
    if (response.ok) show(data);
    else if (response.status === 401 || response.status === 403) askForKey(key ? data.error.message : "");
    else trouble(data.error.message);
  }

  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    key = byId("key").value.trim();
    try {
      sessionStorage.setItem("xeray-status-key", key);
    } catch {
      // As above.
    }
    update();
  });
  document.addEventListener("visibilitychange", () => document.hidden || update());

  (async function run() {
    // No requests for a page that nobody looks at, none while a key is being typed.
    if (!document.hidden && byId("ask").hidden) await update();
    setTimeout(run, PERIOD_MS);
  })();
})();
