/** Elements without markup: all text goes through text nodes, so no name or key can be code. */

/** Handlers and values that `morph` takes over, since attributes do not show them. */
const PROPERTIES = ["onclick", "oninput", "onchange", "onkeydown", "spec"];

/** What an element notes of itself: `morph` leaves it. */
const KEPT = ["open", "data-done"];

/** Make an element.
 *
 * @param {string} tag name, with classes behind dots: `"p.empty"`
 * @param {object | null} attributes attributes; functions and `spec` are set as properties,
 *     `style` is an object of CSS properties; null leaves one out, and so does false outside ARIA
 * @param {...(Node | string | number | null | false | Array)} children
 */
export function el(tag, attributes, ...children) {
  const [name, ...classes] = tag.split(".");
  const node = document.createElement(name);
  if (classes.length) node.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || (value === false && !key.startsWith("aria-"))) continue;
    if (PROPERTIES.includes(key)) node[key] = value;
    else if (key === "style") for (const [a, b] of Object.entries(value)) node.style.setProperty(a, b);
    else node.setAttribute(key, value === true && !key.startsWith("aria-") ? "" : String(value));
  }
  node.append(...flat(children));
  return node;
}

function flat(children) {
  return children
    .flat(Infinity)
    .filter((child) => child !== null && child !== undefined && child !== false && child !== "")
    .map((child) => (child instanceof Node ? child : String(child)));
}

/** Make `old` show what `fresh` shows, and keep its nodes: focus, hover and charts stay. */
export function morph(old, fresh) {
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && !KEPT.includes(name)) old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) === value) continue;
    if (name === "style") old.style.cssText = value; // as an attribute the page's policy forbids it
    else old.setAttribute(name, value);
  }
  for (const name of PROPERTIES) {
    if (old[name] !== fresh[name]) old[name] = fresh[name] ?? null;
  }
  if (old instanceof HTMLInputElement || old instanceof HTMLSelectElement) {
    if (document.activeElement !== old && old.value !== fresh.value) old.value = fresh.value;
    if (old instanceof HTMLInputElement) return;
  }
  if (!old.localName.includes("-")) morphChildren(old, [...fresh.childNodes]);
}

/** Make the children of `parent` show what `fresh` shows.
 *
 * An element with `data-id` meets the one of the same id, wherever it stands; others meet in order.
 */
export function morphChildren(parent, fresh) {
  const named = new Map();
  for (const child of parent.children) {
    if (child.dataset.id) named.set(child.dataset.id, child);
  }
  let place = parent.firstChild;
  for (const wanted of fresh) {
    const id = wanted.dataset?.id;
    const found = id ? named.get(id) : place;
    const suits = found && (id ? true : !found.dataset?.id) && isAlike(found, wanted);
    if (!suits) {
      parent.insertBefore(wanted, place);
      continue;
    }
    if (found === place) place = place.nextSibling;
    else parent.insertBefore(found, place);
    if (found.nodeType === Node.TEXT_NODE) {
      if (found.data !== wanted.data) found.data = wanted.data;
    } else {
      morph(found, wanted);
    }
  }
  while (place) {
    const next = place.nextSibling;
    place.remove();
    place = next;
  }
}

function isAlike(one, other) {
  return one.nodeType === other.nodeType && one.nodeName === other.nodeName;
}

/** An address to somewhere else, if it is one of the web; anything else is shown as text. */
export function outLink(address, text) {
  if (!/^https?:\/\//i.test(address ?? "")) return address ? el("span", null, text) : null;
  return el("a", { href: address, target: "_blank", rel: "noreferrer noopener" }, text, el("span", { "aria-hidden": "true" }, " ↗"));
}

/** Say something to who cannot see the page. */
export function say(text) {
  document.getElementById("said").textContent = text;
}

/** Shapes in a square of 16; no font has all of the signs that they stand for. */
const ICONS = {
  link: "M6.5 9.5l3-3M7 4.5l1.2-1.2a3.1 3.1 0 0 1 4.5 4.5L11.5 9M9 11.5l-1.2 1.2a3.1 3.1 0 0 1-4.5-4.5L4.5 7",
  sun: "M8 5.2a2.8 2.8 0 1 0 0 5.6a2.8 2.8 0 0 0 0-5.6M8 1.5v1.2M8 13.3v1.2M1.5 8h1.2M13.3 8h1.2M3.4 3.4l.9.9M11.7 11.7l.9.9M3.4 12.6l.9-.9M11.7 4.3l.9-.9",
  moon: "M13 9.6A5.5 5.5 0 0 1 6.4 3a5.5 5.5 0 1 0 6.6 6.6z",
  close: "M4 4l8 8M12 4l-8 8",
};

export function icon(name) {
  const svg = svgNode("svg", { viewBox: "0 0 16 16", class: "icon", "aria-hidden": "true" });
  svg.append(svgNode("path", { d: ICONS[name] }));
  return svg;
}

/** A button that puts an address of this page on the clipboard. */
export function copyLink(hash, what) {
  const click = async (event) => {
    const button = event.currentTarget;
    const address = new URL(hash, location.href).href;
    try {
      await navigator.clipboard.writeText(address);
    } catch {
      location.hash = hash; // without a clipboard the address bar has it
    }
    say(`Link to ${what} copied`);
    button.dataset.done = "";
    setTimeout(() => button.removeAttribute("data-done"), 1200);
  };
  const name = `Copy the link to ${what}`;
  return el("button.icon.copy", { type: "button", title: name, "aria-label": name, onclick: click }, icon("link"));
}

/** A bar that shows a share of 0–1, with its meaning in words. */
export function bar(share, label, kind = "") {
  const percent = Math.max(0, Math.min(1, share || 0)) * 100;
  return el(
    `div.bar${kind ? `.${kind}` : ""}`,
    { role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(percent) },
    el("i", { style: { "--share": `${percent.toFixed(2)}%` } }),
  );
}

/** A heading with what belongs to it, in a section of its own. */
export function section(title, attributes, ...children) {
  return el("section.panel", { "aria-label": title, ...attributes }, el("h2", null, title), ...children);
}

/** A table with a caption for who cannot see it; cells may be nodes. */
export function table(caption, heads, rows) {
  const cell = (value, index) => el(`td${heads[index].number ? ".number" : ""}`, null, value);
  return el(
    "div.scroll",
    { tabindex: 0, role: "region", "aria-label": caption },
    el(
      "table",
      null,
      el("caption.unseen", null, caption),
      el("thead", null, el("tr", null, heads.map((head) => el(`th${head.number ? ".number" : ""}`, { scope: "col" }, head.text)))),
      el("tbody", null, rows.map((row) => el("tr", null, row.map(cell)))),
    ),
  );
}

/** What to do where there is nothing to see. */
export function empty(text, ...more) {
  return el("p.empty", null, text, ...more);
}

/** A line without axes: how a value went so far. */
export function sparkline(values, label) {
  const numbers = values.filter((one) => Number.isFinite(one));
  const svg = svgNode("svg", { viewBox: "0 0 100 28", preserveAspectRatio: "none", class: "sparkline", role: "img", "aria-label": label });
  if (numbers.length < 2) return svg;
  const low = Math.min(...numbers);
  const high = Math.max(...numbers);
  const place = (one, index) => `${((index / (numbers.length - 1)) * 100).toFixed(2)},${(26 - ((one - low) / (high - low || 1)) * 24).toFixed(2)}`;
  svg.append(svgNode("polyline", { points: numbers.map(place).join(" ") }));
  return svg;
}

function svgNode(name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

/** Names with their values; what has none is left out. */
export function facts(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return el("dl.facts", null, known.map(([name, value, kind]) => el(`div${kind ? `.${kind}` : ""}`, null, el("dt", null, name), el("dd", null, value))));
}

/** A word with a colour: the word alone says it. */
export function chip(text, kind = "") {
  return el(`span.chip${kind ? `.${kind}` : ""}`, null, text);
}

/** How a run's, a pipeline's or a sink's state is coloured. */
export function stateChip(state) {
  const kinds = { running: "on", done: "good", finished: "good", failed: "bad", crashed: "bad", killed: "bad", retrying: "warn", "no key": "warn", opening: "on" };
  return chip(state, kinds[state] ?? "");
}
