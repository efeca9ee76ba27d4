"use strict";

const REFRESH = 2000; // milliseconds
const COLOURS = 6; // in page.css
const READING = 8000; // milliseconds that an error of a button stays
const at = (id) => document.getElementById(id);

let key = sessionStorage.getItem("key") || "";
let followed = ""; // the instance whose log is shown
let errorUntil = 0; // milliseconds of the clock
const opened = new Set(); // requests whose contents are shown

/** An element with attributes; children are elements or text, which is never read as HTML. */
function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) {
    if (attribute.startsWith("on")) made.addEventListener(attribute.slice(2), value);
    else if (value !== "") made.setAttribute(attribute, value);
  }
  made.append(...children);
  return made;
}

function bytes(count) {
  if (count === null) return "";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; count >= 1000 && unit < units.length - 1; unit++) count /= 1000;
  return `${count.toFixed(unit ? 1 : 0)} ${units[unit]}`;
}

function duration(seconds) {
  const steps = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const [length, unit] = steps.find(([length]) => seconds >= length) || [1, "s"];
  return `${Math.floor(seconds / length)} ${unit}`;
}

const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString();

async function ask(path, body) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, body ? { method: "POST", headers, body } : { headers });
  if (answer.status === 401) {
    at("login").hidden = false;
    document.querySelector("main").hidden = true;
    throw new Error(key ? "this key is not accepted" : "an API key is needed");
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    throw new Error(told?.error?.message || `the gateway answers ${answer.status}`);
  }
  return answer;
}

/** Replaces what is in `place`, and leaves the keyboard's focus where it was. */
function replace(place, ...children) {
  const focused = place.contains(document.activeElement) ? document.activeElement.id : "";
  place.replaceChildren(...children);
  if (focused) at(focused)?.focus();
}

const total = (need) => Object.values(need).reduce((sum, count) => sum + count, 0);

function button(each, label, action) {
  return make("button", {
    type: "button", id: `${label}-${each.name}`, "aria-label": `${label} ${each.name}`,
    onclick: action,
  }, label);
}

async function order(verb, name) {
  try {
    await ask(`/models/${verb}`, JSON.stringify({ model: name }));
    await refresh();
  } catch (error) {
    errorUntil = Date.now() + READING;
    say(error.message, true);
  }
}

function showInstances(data) {
  const rows = data.instances.map((each) => {
    const state = make("td", { class: each.state }, each.state);
    if (each.reason && each.state !== "ready") {
      state.append(make("span", { class: "reason" }, each.reason));
    }
    if (each.nodes.length) {
      state.append(make("span", { class: "reason" }, `on ${each.nodes.join(", ")}`));
    }
    const buttons = make("td", {}, button(each, "Log", () => openLog(each.name)));
    const may_load = each.state === "asleep" || (each.state === "failed" && each.start === "demand");
    if (each.engine !== "gateway" && may_load) {
      buttons.append(" ", button(each, "Load", () => order("load", each.name)));
    } else if (each.engine !== "gateway" && each.state === "ready" && data.unloads) {
      buttons.append(" ", button(each, "Unload", () => order("unload", each.name)));
    }
    const ago = (when) => (when === null ? "" : duration(data.at - when));
    const number = (text) => make("td", { class: "number" }, text);
    return make("tr", {},
      make("th", { scope: "row" }, each.name), make("td", {}, each.model), state,
      number(ago(each.ready_since)), number(each.last_use ? `${ago(each.last_use)} ago` : ""),
      number(String(each.in_flight)), number(bytes(each.memory)), number(bytes(each.gpu_memory)),
      number(total(each.need) ? bytes(total(each.need)) : ""), buttons);
  });
  replace(at("instances"), ...rows);
}

function showDevices(data) {
  const loaded = data.instances.filter((each) => each.pid !== null);
  const sum = (value) => loaded.reduce((found, each) => found + (value(each) || 0), 0);
  const rows = data.devices.map((device) => {
    const used = device.total - device.free;
    const measured = device.name === "ram" ? sum((each) => each.memory) :
      // Processes are not told apart by GPU: with one GPU all is on it.
      data.devices.length === 2 ? sum((each) => each.gpu_memory) : null;
    const counted = sum((each) => each.need[device.name]);
    const mine = Math.min(measured ?? counted, used);
    const words = `${bytes(used)} of ${bytes(device.total)} used` +
      (measured === null ? "" : `, ${bytes(measured)} by instances`) +
      (counted ? `, counted with ${bytes(counted)}` : "");
    const bar = make("div", { class: "bar", role: "img", "aria-label": `${device.name}: ${words}` });
    for (const [kind, size] of [["instances", mine], ["other", used - mine]]) {
      const part = make("div", { class: kind });
      part.style.width = `${(100 * size) / device.total}%`;
      bar.append(part);
    }
    return make("div", { class: "device" }, make("strong", {}, device.name), bar, words);
  });
  replace(at("devices"), ...rows);
}

/** Lines of the last hour: `samples` are objects of counts by instance. */
function showChart(place, samples, history, names, factor, unit) {
  const values = names.map((name) => samples.map((each) => (each[name] || 0) * factor));
  const most = Math.max(0, ...values.flat());
  const top = most || 1;
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${history.length - 1} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  const last = names.map((name, n) => `${name} ${(values[n].at(-1) || 0).toFixed(1)}`);
  svg.setAttribute("aria-label", `${unit}, now: ${last.join(", ") || "nothing"}`);
  const start = history.length - samples.length;
  values.forEach((line, n) => {
    const points = line.map((value, x) => `${start + x},${99 - (97 * value) / top}`);
    const drawn = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    drawn.setAttribute("points", points.join(" "));
    drawn.style.stroke = `var(--c${n % COLOURS})`;
    svg.append(drawn);
  });
  const axis = make("div", { class: "axis" }, make("span", {}, "an hour ago"),
    make("span", {}, `at most ${most.toFixed(1)}`), make("span", {}, "now"));
  replace(place, svg, axis);
}

function showCharts(data) {
  const names = data.instances.filter((each) => each.engine !== "gateway").map((each) => each.name);
  const { history } = data;
  const minute = 60 / history.interval;
  showChart(at("requests-chart"), history.requests, history, names, minute, "Requests a minute");
  showChart(at("tokens-chart"), history.tokens, history, names, 1 / history.interval,
    "Tokens a second");
  const boxes = names.flatMap((name, n) => {
    const box = make("span", { class: "box" });
    box.style.background = `var(--c${n % COLOURS})`;
    return [box, name];
  });
  replace(at("names"), ...boxes);
}

function showRequests(data) {
  const number = (value) => make("td", { class: "number" }, value === null ? "" : String(value));
  const rows = data.requests.flatMap((each) => {
    const status = make("td", { class: each.status >= 400 ? "number error" : "number" },
      String(each.status));
    const row = make("tr", {}, make("td", {}, clock(each.at)), make("td", {}, each.model || ""),
      make("td", {}, each.instance), make("td", {}, each.path), status,
      make("td", { class: "number" }, each.seconds.toFixed(2)), number(each.prompt_tokens),
      number(each.tokens));
    if (!data.inspect) return [row];
    const is_open = opened.has(each.id);
    row.append(make("td", {}, make("button", {
      type: "button", id: `request-${each.id}`, "aria-expanded": String(is_open),
      onclick: () => {
        if (!opened.delete(each.id)) opened.add(each.id);
        showRequests(data);
      },
    }, is_open ? "Hide" : "Show")));
    if (!is_open) return [row];
    const contents = make("td", { colspan: "9" }, make("pre", { tabindex: "0" }, each.asked || ""),
      make("pre", { tabindex: "0" }, each.answered || ""));
    return [row, make("tr", {}, contents)];
  });
  at("contents").hidden = !data.inspect;
  at("no-requests").hidden = rows.length > 0;
  replace(at("requests"), ...rows);
}

async function showLog() {
  const text = await (await ask(`/dashboard/log?name=${encodeURIComponent(followed)}`)).text();
  const place = at("log");
  const is_at_end = place.scrollTop + place.clientHeight >= place.scrollHeight - 5;
  place.textContent = text;
  if (is_at_end) place.scrollTop = place.scrollHeight;
}

async function openLog(name) {
  followed = name;
  at("log").textContent = "";
  at("log-title").textContent = `Log of ${name}`;
  at("log-section").hidden = false;
  at("log-title").focus();
  await refresh();
}

function closeLog() {
  const button = at(`Log-${followed}`);
  followed = "";
  at("log-section").hidden = true;
  button?.focus();
}

function say(words, is_bad) {
  const state = at("state");
  if (state.textContent !== words) state.textContent = words; // else it would be read out again
  state.classList.toggle("bad", is_bad);
}

async function refresh() {
  try {
    const data = await (await ask("/dashboard/data")).json();
    at("login").hidden = true;
    document.querySelector("main").hidden = false;
    showInstances(data);
    showDevices(data);
    showCharts(data);
    showRequests(data);
    if (followed) await showLog();
    const ready = data.instances.filter((each) => each.state === "ready").length;
    const waiting = data.held ? `, ${data.held} requests waiting` : "";
    if (Date.now() > errorUntil) {
      say(`${ready} of ${data.instances.length} ready${waiting}`, false);
    }
  } catch (error) {
    say(error instanceof TypeError ? "the gateway does not answer" : error.message, true);
  }
}

at("log-close").addEventListener("click", closeLog);
at("login").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value.trim();
  sessionStorage.setItem("key", key);
  refresh();
});

async function follow() {
  if (!document.hidden) await refresh();
  setTimeout(follow, REFRESH);
}
follow();
