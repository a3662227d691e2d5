// Keeps a page as it is now: ages each second, and the parts that the coordinator sends when they change.
"use strict";

(() => {
  const body = document.body;
  // Seconds by which this machine's clock is behind the coordinator's.
  const behind = Number(body.dataset.now) - Date.now() / 1000;

  const two = (value) => String(value).padStart(2, "0");

  // As `age_text` of the coordinator.
  function ageText(seconds) {
    const s = Math.max(0, Math.floor(seconds));
    if (s < 60) return `${s} s`;
    if (s < 3600) return `${Math.floor(s / 60)} m ${two(s % 60)} s`;
    if (s < 86400) return `${Math.floor(s / 3600)} h ${two(Math.floor((s % 3600) / 60))} m`;
    return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
  }

  // As `end_text` of the coordinator.
  function endText(sooner, later) {
    if (later <= 0) return "later than foreseen";
    const first = Math.max(0, sooner);
    if (later - first <= 0.1 * later || ageText(first) === ageText(later)) return `in about ${ageText(later)}`;
    return first >= 1 ? `in ${ageText(first)} to ${ageText(later)}` : `within ${ageText(later)}`;
  }

  function writeAges() {
    const now = Date.now() / 1000 + behind;
    for (const time of document.querySelectorAll("time[data-until]")) {
      const text = endText(Number(time.dataset.sooner) - now, Number(time.dataset.until) - now);
      if (time.textContent !== text) time.textContent = text;
    }
    for (const time of document.querySelectorAll("time[data-since]")) {
      const text = ageText(now - Number(time.dataset.since));
      if (time.textContent !== text) time.textContent = text;
    }
  }

  // Makes `old` like `fresh` and keeps what is the same, so that focus, selection and open details stay.
  function morph(old, fresh) {
    if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) {
      old.replaceWith(fresh);
      return;
    }
    if (old.nodeType !== Node.ELEMENT_NODE) {
      if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
      return;
    }
    for (const { name } of [...old.attributes]) {
      if (!fresh.hasAttribute(name) && !(name === "open" && old.nodeName === "DETAILS")) old.removeAttribute(name);
    }
    for (const { name, value } of fresh.attributes) {
      if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    // Ages are written here, and what somebody types stays theirs.
    const written = old.dataset?.since !== undefined || old.dataset?.until !== undefined;
    if (!written && old.nodeName !== "INPUT") morphChildren(old, fresh);
  }

  function morphChildren(old, fresh) {
    const keyed = new Map();
    for (const child of old.children) if (child.dataset.key) keyed.set(child.dataset.key, child);
    let at = old.firstChild;
    for (const child of [...fresh.childNodes]) {
      const same = child.dataset?.key && keyed.get(child.dataset.key);
      if (same && same !== at) {
        old.insertBefore(same, at);
        at = same;
      }
      const keeps = at && (same || !at.dataset?.key);
      if (!keeps) {
        old.insertBefore(child, at);
        continue;
      }
      const next = at.nextSibling;
      morph(at, child);
      at = next;
    }
    while (at) {
      const next = at.nextSibling;
      at.remove();
      at = next;
    }
  }

  // A screen reader hears of what matters, at most every ten seconds.
  const announcement = document.getElementById("announcement");
  const ANNOUNCE_MS = 10000;
  let said = document.querySelector("[data-announce]")?.dataset.announce ?? "";
  let saidAt = Date.now();
  function announce() {
    const told = document.querySelector("[data-announce]")?.dataset.announce ?? "";
    if (told === said || Date.now() - saidAt < ANNOUNCE_MS) return;
    said = told;
    saidAt = Date.now();
    announcement.textContent = told;
  }

  function follow(address) {
    const state = document.getElementById("link-state");
    const show = (text, away) => {
      state.hidden = false;
      state.textContent = text;
      state.classList.toggle("away", away);
    };
    const source = new EventSource(address);
    source.addEventListener("open", () => show("live", false));
    source.addEventListener("parts", (event) => {
      for (const [name, html] of Object.entries(JSON.parse(event.data))) {
        const part = document.getElementById(`live-${name}`);
        if (!part) continue;
        const fresh = part.cloneNode(false);
        const template = document.createElement("template");
        template.innerHTML = html;
        fresh.append(template.content);
        morphChildren(part, fresh);
      }
      writeAges();
      announce();
      document.dispatchEvent(new Event("parts"));
    });
    source.addEventListener("end", () => {
      source.close();
      show("final", false);
    });
    source.addEventListener("error", () => {
      show(source.readyState === EventSource.CLOSED ? "not live, reload to see more" : "connecting…", true);
    });
    return source;
  }

  // Appends the lines that a running build prints, and stays at the end for as long as the reader is there.
  const LINES_KEPT = 5000;
  const NEAR_END_PX = 80;
  function tail(address) {
    const lines = document.getElementById("lines");
    const state = document.getElementById("link-state");
    let last = Number(new URL(address, location.href).searchParams.get("after"));
    let source;
    const page = document.scrollingElement;
    const atEnd = () => page.scrollHeight - page.scrollTop - page.clientHeight < NEAR_END_PX;
    const show = (text, away) => {
      state.hidden = false;
      state.textContent = text;
      state.classList.toggle("away", away);
    };
    function connect() {
      const from = new URL(address, location.href);
      from.searchParams.set("after", last);
      source = new EventSource(from);
      source.addEventListener("open", () => show("following", false));
      source.addEventListener("lines", (event) => {
        const follows = atEnd();
        const { html, skipped } = JSON.parse(event.data);
        const template = document.createElement("template");
        template.innerHTML = html;
        if (skipped) {
          const gap = document.createElement("li");
          gap.className = "gap";
          gap.textContent = `… ${skipped} lines came too fast; reload to see them`;
          lines.append(gap);
        }
        last += skipped + template.content.childElementCount;
        lines.append(template.content);
        while (lines.childElementCount > LINES_KEPT) lines.firstElementChild.remove();
        if (follows) page.scrollTop = page.scrollHeight;
      });
      source.addEventListener("end", () => {
        source.close();
        show("ended", false);
        announcement.textContent = "The build has ended.";
      });
      source.addEventListener("error", () => {
        // The address says from where on: a connection of the browser's own would repeat lines.
        source.close();
        show("connecting…", true);
        setTimeout(connect, 3000);
      });
    }
    connect();
    if (!location.hash) page.scrollTop = page.scrollHeight;
  }

  // For the scripts of single pages.
  window.drover = { follow, morphChildren };

  writeAges();
  setInterval(() => {
    writeAges();
    announce();
  }, 1000);
  if (body.dataset.live) follow(body.dataset.live);
  if (body.dataset.tail) tail(body.dataset.tail);
})();
