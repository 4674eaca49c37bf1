// Shows openapi.json; built from DOM nodes only.
"use strict";

(async () => {
  const base = new URL(".", location.href).href.replace(/\/$/, "");
  document.getElementById("base").textContent = base;
  document.getElementById("base-v1").textContent = `${base}/v1`;
  const root = document.getElementById("operations");

  function element(name, className, text) {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function typeName(schema) {
    if (!schema) return "";
    if (schema.$ref) return schema.$ref.split("/").pop();
    const options = schema.anyOf || schema.oneOf;
    if (options) return [...new Set(options.map(typeName))].filter((name) => name !== "null").join(" or ");
    if (schema.const !== undefined) return JSON.stringify(schema.const);
    if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
    if (schema.type === "array") return `list of ${typeName(schema.items) || "values"}`;
    return schema.type || "any";
  }

  function limits(schema) {
    const parts = [schema, ...(schema.anyOf || [])];
    const found = [];
    for (const part of parts) {
      if (Math.abs(part.minimum) >= Number.MAX_SAFE_INTEGER) found.push("64 bits");
      else if (part.minimum !== undefined) found.push(`≥ ${part.minimum}`);
      if (part.exclusiveMinimum !== undefined) found.push(`> ${part.exclusiveMinimum}`);
      if (part.maximum !== undefined) found.push(`≤ ${part.maximum}`);
      if (part.maxItems !== undefined) found.push(`at most ${part.maxItems}`);
    }
    return found.join(", ");
  }

  function fields(schemas, schema, title) {
    const model = schemas[typeName(schema)];
    const box = element("div");
    if (!model || !model.properties) return box;
    box.append(element("h3", "", title));
    const table = box.appendChild(element("table")).appendChild(element("tbody"));
    for (const [name, property] of Object.entries(model.properties)) {
      const row = table.appendChild(element("tr"));
      row.append(element("td", "", name));
      const type = row.appendChild(element("td", "type", typeName(property)));
      const bound = limits(property);
      if (bound) type.append(`, ${bound}`);
      if ((model.required || []).includes(name)) type.append(" ", element("span", "required", "required"));
      row.append(element("td", "", property.description || ""));
    }
    return box;
  }

  function show(path, method, operation, schemas) {
    const box = element("details", "operation");
    const summary = box.appendChild(element("summary"));
    summary.append(element("span", "method", method.toUpperCase()), element("span", "path", path));
    summary.append(element("span", "summary", operation.summary));
    const content = box.appendChild(element("div", "content"));
    const request = operation.requestBody?.content["application/json"]?.schema;
    if (request) content.append(fields(schemas, request, "Request"));
    const answers = operation.responses["200"].content || {};
    for (const [type, { schema }] of Object.entries(answers)) {
      const title = type === "text/event-stream" ? "Events of a stream" : "Answer";
      content.append(fields(schemas, schema, title));
    }
    if (!content.textContent) content.append(element("p", "note", "Plain text."));
    return box;
  }

  try {
    const spec = await (await fetch("openapi.json")).json();
    let tag = "";
    for (const [path, methods] of Object.entries(spec.paths)) {
      for (const [method, operation] of Object.entries(methods)) {
        if (operation.tags[0] !== tag) {
          tag = operation.tags[0];
          root.append(element("h2", "", tag));
        }
        root.append(show(path, method, operation, spec.components.schemas));
      }
    }
  } catch {
    root.append(element("p", "", "openapi.json cannot be loaded. Is the server still running?"));
  }
})();
