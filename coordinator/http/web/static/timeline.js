// Moves and zooms the window of a timeline. The server draws each window; this asks for it and keeps the address.
"use strict";

(() => {
  const area = document.getElementById("timeline");
  const ZOOM = 1.5; // of a key or a turn of the wheel
  const STEP = 0.25; // of a window's width, for a key
  const LEAST_S = 1;
  const SETTLE_MS = 250; // after the last movement, the window is asked for
  const DRAG_PX = 4; // less is a click
  const path = location.pathname;
  let source = null; // of the live parts of this window
  let asked = null; // controller of the request on its way
  let settling = 0;
  let moved = null; // the window that fingers made, until the server has drawn it

  const data = () => document.getElementById("window").dataset;
  const drawing = () => area.querySelector("svg");
  const drawn = () => ({ since: Number(data().since), until: Number(data().until) });
  const seen = () => moved ?? drawn();

  function bounded({ since, until }) {
    const first = Number(data().first);
    const last = Math.max(Number(data().last), first + LEAST_S);
    const width = Math.min(Math.max(until - since, LEAST_S), last - first);
    const begin = Math.min(Math.max(since, first), last - width);
    return { since: begin, until: begin + width };
  }

  function zoomed(factor, share) {
    const { since, until } = seen();
    const at = since + (until - since) * share;
    return { since: at - (at - since) * factor, until: at + (until - at) * factor };
  }

  function shifted(share) {
    const { since, until } = seen();
    const by = (until - since) * share;
    return { since: since + by, until: until + by };
  }

  const query = (window) => `?from=${window.since.toFixed(3)}&to=${window.until.toFixed(3)}`;
  const widthNow = () => Math.round(area.clientWidth);
  const withWidth = (search) => `${search}${search ? "&" : "?"}width=${widthNow()}`;

  // Shows a window at once, as far as it is drawn; the server's drawing follows.
  function move(window) {
    moved = bounded(window);
    place();
    // What is on its way would show another window.
    asked?.abort();
    clearTimeout(settling);
    settling = setTimeout(() => load(query(moved), true), SETTLE_MS);
  }

  function place() {
    if (!moved) return;
    const old = drawn();
    const scale = (old.until - old.since) / (moved.until - moved.since);
    const x = ((old.since - moved.since) / (moved.until - moved.since)) * Number(data().width);
    document.getElementById("plot")?.setAttribute("transform", `translate(${x} 0) scale(${scale} 1)`);
  }

  async function load(search, remember) {
    clearTimeout(settling);
    asked?.abort();
    const request = (asked = new AbortController());
    source?.close();
    document.getElementById("link-state").hidden = true;
    area.setAttribute("aria-busy", "true");
    try {
      const answer = await fetch(path + withWidth(search), { signal: request.signal });
      if (!answer.ok || answer.redirected) throw new Error(answer.statusText);
      const text = await answer.text();
      if (request.signal.aborted) return;
      const page = new DOMParser().parseFromString(text, "text/html");
      moved = null;
      for (const fresh of page.querySelectorAll('[id^="live-"]')) {
        drover.morphChildren(document.getElementById(fresh.id), fresh);
      }
      if (remember && search !== location.search) history.pushState(null, "", path + search);
      area.removeAttribute("aria-busy");
      document.getElementById("announcement").textContent = document.querySelector("#live-window p").textContent;
      follow(search);
    } catch (error) {
      // Another window was asked for meanwhile; or the browser shows why this one cannot be had.
      if (error.name !== "AbortError") location.assign(path + search);
    }
  }

  function follow(search) {
    if (data().live) source = drover.follow(`/live${path}${withWidth(search)}`);
  }

  area.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "+" || event.key === "=") move(zoomed(1 / ZOOM, 0.5));
    else if (event.key === "-" || event.key === "_") move(zoomed(ZOOM, 0.5));
    else if (event.key === "ArrowLeft") move(shifted(-STEP));
    else if (event.key === "ArrowRight") move(shifted(STEP));
    else if (event.key === "Home") load("", true);
    else return;
    event.preventDefault();
  });

  const share = (clientX) => {
    const box = (drawing() ?? area).getBoundingClientRect();
    return Math.min(1, Math.max(0, (clientX - box.left) / box.width));
  };

  // The page scrolls below the wheel, unless Ctrl is held; browsers say the same of a pinch on a touchpad.
  area.addEventListener(
    "wheel",
    (event) => {
      if (event.ctrlKey) move(zoomed(event.deltaY > 0 ? ZOOM ** 0.5 : 1 / ZOOM ** 0.5, share(event.clientX)));
      else if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) move(shifted(event.deltaX / area.clientWidth));
      else return;
      event.preventDefault();
    },
    { passive: false },
  );

  // Fingers, pens and mice that are down, with where they were last.
  const down = new Map();
  let travelled = 0;
  area.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !drawing()) return;
    if (!down.size) travelled = 0;
    down.set(event.pointerId, event.clientX);
  });
  area.addEventListener("pointermove", (event) => {
    const before = down.get(event.pointerId);
    if (before === undefined) return;
    const others = [...down].filter(([id]) => id !== event.pointerId);
    travelled += Math.abs(event.clientX - before);
    if (travelled < DRAG_PX) return;
    if (!area.hasPointerCapture(event.pointerId)) {
      area.setPointerCapture(event.pointerId);
      area.focus({ preventScroll: true });
    }
    down.set(event.pointerId, event.clientX);
    if (others.length) {
      const fixed = others[0][1];
      const factor = Math.max(8, Math.abs(before - fixed)) / Math.max(8, Math.abs(event.clientX - fixed));
      move(zoomed(factor, share(fixed)));
    } else {
      move(shifted((before - event.clientX) / (drawing()?.clientWidth || area.clientWidth)));
    }
  });
  for (const name of ["pointerup", "pointercancel"]) {
    area.addEventListener(name, (event) => down.delete(event.pointerId));
  }
  // What was a drag is no click on a link, and links are not dragged away.
  area.addEventListener("dragstart", (event) => event.preventDefault());
  area.addEventListener(
    "click",
    (event) => {
      if (travelled >= DRAG_PX) event.preventDefault();
    },
    true,
  );

  // Links to other windows of this page are followed without a new page.
  document.getElementById("main").addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="?"]');
    if (!link || event.defaultPrevented || event.button || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    load(link.getAttribute("href").replace(/^\?$/, ""), true);
  });
  document.addEventListener("parts", place);
  addEventListener("popstate", () => load(location.search, false));

  let resizing = 0;
  addEventListener("resize", () => {
    clearTimeout(resizing);
    resizing = setTimeout(() => {
      if (Math.abs(widthNow() - Number(data().width)) > 8) load(location.search, false);
    }, SETTLE_MS);
  });

  document.getElementById("timeline-keys").hidden = false;
  area.classList.add("moves");
  if (Math.abs(widthNow() - Number(data().width)) > 8) load(location.search, false);
  else follow(location.search);
})();
