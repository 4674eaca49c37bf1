// A small Markdown renderer that builds DOM nodes and never parses HTML: text can only become text.
"use strict";

const Markdown = (() => {
  const INLINE = /(`+)([\s\S]+?)\1(?!`)|\*\*([^*\n]+(?:\*[^*\n]+)*)\*\*|(?<![\w*])\*([^*\s][^*\n]*?)\*(?![\w*])|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)|(https?:\/\/[^\s<>"'`]+[^\s<>"'`.,;:!?)\]])/g;
  const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)\s*$/;
  const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;

  function element(name, className, text) {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function link(text, address) {
    const node = element("a", "", text);
    node.href = address;
    node.rel = "noopener noreferrer";
    node.target = "_blank";
    return node;
  }

  function inline(parent, text) {
    let end = 0;
    for (const match of text.matchAll(INLINE)) {
      parent.append(text.slice(end, match.index));
      const [whole, , code, bold, italic, label, address, bare] = match;
      if (code !== undefined) parent.append(element("code", "", code.trim() || code));
      else if (bold !== undefined) inline(parent.appendChild(element("strong")), bold);
      else if (italic !== undefined) inline(parent.appendChild(element("em")), italic);
      else if (label !== undefined) parent.append(link(label, address));
      else parent.append(link(bare, bare));
      end = match.index + whole.length;
    }
    parent.append(text.slice(end));
  }

  function lines(parent, rows) {
    rows.forEach((row, place) => {
      if (place) parent.append(element("br"));
      inline(parent, row);
    });
  }

  function codeBlock(language, text) {
    const block = element("div", "code");
    const head = element("div", "code-head");
    head.append(element("span", "", language || "text"));
    const copy = element("button", "ghost copy-code", "Copy");
    copy.type = "button";
    head.append(copy);
    const pre = element("pre");
    pre.tabIndex = 0;
    pre.append(element("code", "", text));
    block.append(head, pre);
    return block;
  }

  function readFence(source, start, fence) {
    const close = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
    let end = start + 1;
    while (end < source.length && !close.test(source[end])) end += 1;
    return [codeBlock(fence[2], source.slice(start + 1, end).join("\n")), end + 1];
  }

  function readList(source, start) {
    const base = ITEM.exec(source[start]);
    const indent = base[1].length;
    const list = element(base[2] ? "ol" : "ul");
    if (base[2] && base[2] !== "1") list.start = Number(base[2]);
    let place = start;
    while (place < source.length) {
      const item = ITEM.exec(source[place]);
      if (!item || item[1].length < indent) break;
      const isNested = item[1].length > indent + 1 && list.lastChild;
      if (!isNested && Boolean(item[2]) !== Boolean(base[2])) break;
      if (isNested) {
        const [nested, next] = readList(source, place);
        list.lastChild.append(nested);
        place = next;
        continue;
      }
      const node = list.appendChild(element("li"));
      const rows = [item[3]];
      place += 1;
      while (place < source.length && /^\s+\S/.test(source[place]) && !ITEM.test(source[place])) {
        rows.push(source[place].trim());
        place += 1;
      }
      lines(node, rows);
      if (place + 1 < source.length && !source[place].trim() && ITEM.test(source[place + 1])) place += 1;
    }
    return [list, place];
  }

  const cells = (row) => row.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const isTable = (source, place) =>
    source[place].includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)+\|?\s*$/.test(source[place + 1] ?? "");

  function readTable(source, start) {
    const table = element("table");
    const head = table.appendChild(element("thead")).appendChild(element("tr"));
    for (const cell of cells(source[start])) inline(head.appendChild(element("th")), cell);
    const body = table.appendChild(element("tbody"));
    let place = start + 2;
    for (; place < source.length && source[place].includes("|"); place += 1) {
      const row = body.appendChild(element("tr"));
      for (const cell of cells(source[place])) inline(row.appendChild(element("td")), cell);
    }
    const frame = element("div", "table");
    frame.append(table);
    return [frame, place];
  }

  function readQuote(source, start) {
    let end = start;
    const rows = [];
    for (; end < source.length && /^ {0,3}>/.test(source[end]); end += 1) {
      rows.push(source[end].replace(/^ {0,3}> ?/, ""));
    }
    const quote = element("blockquote");
    quote.append(render(rows.join("\n")));
    return [quote, end];
  }

  function readParagraph(source, start) {
    let end = start + 1;
    while (end < source.length && source[end].trim() && !startsBlock(source, end)) end += 1;
    const paragraph = element("p");
    lines(paragraph, source.slice(start, end));
    return [paragraph, end];
  }

  const startsBlock = (source, place) =>
    FENCE.test(source[place]) || ITEM.test(source[place]) ||
    /^#{1,6}\s/.test(source[place]) || /^ {0,3}>/.test(source[place]);

  function readBlock(source, place) {
    const row = source[place];
    const fence = FENCE.exec(row);
    if (fence) return readFence(source, place, fence);
    const heading = /^(#{1,6})\s+(.*?)\s*#*$/.exec(row);
    if (heading) {
      // The page has headings of its own above these.
      const node = element(`h${Math.min(6, heading[1].length + 2)}`);
      inline(node, heading[2]);
      return [node, place + 1];
    }
    if (/^ {0,3}([-*_])( *\1){2,}\s*$/.test(row)) return [element("hr"), place + 1];
    if (/^ {0,3}>/.test(row)) return readQuote(source, place);
    if (ITEM.test(row)) return readList(source, place);
    if (isTable(source, place)) return readTable(source, place);
    return readParagraph(source, place);
  }

  // Source text of each block that was built, so that an unchanged one can stay in the page.
  const sources = new WeakMap();

  function blocks(text) {
    const source = text.replace(/\r\n?/g, "\n").split("\n");
    const built = [];
    let place = 0;
    while (place < source.length) {
      if (!source[place].trim()) {
        place += 1;
        continue;
      }
      const [node, next] = readBlock(source, place);
      sources.set(node, source.slice(place, next).join("\n"));
      built.push(node);
      place = next;
    }
    return built;
  }

  function render(text) {
    const fragment = document.createDocumentFragment();
    fragment.append(...blocks(text));
    return fragment;
  }

  // Makes `parent` show `text`, replacing only what differs: a selection in finished blocks survives.
  function update(parent, text) {
    const built = blocks(text);
    built.forEach((node, place) => {
      const old = parent.childNodes[place];
      if (!old) parent.append(node);
      else if (sources.get(old) !== sources.get(node)) old.replaceWith(node);
    });
    while (parent.childNodes.length > built.length) parent.lastChild.remove();
  }

  return { update };
})();
