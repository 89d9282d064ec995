"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const make = (name, className, text) => {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const short = (value) => {
    if (value === null || value === undefined) return "not finite";
    return String(Number(value.toPrecision(3)));
  };

  // One bubble for formulas and tokens: on pointing, on focus, gone with Escape.
  const bubble = document.getElementById("bubble");
  let about = null;
  const put = () => {
    const at = about.getClientRects()[0] || about.getBoundingClientRect();
    const { width, height } = bubble.getBoundingClientRect();
    const left = Math.min(Math.max(8, at.left + at.width / 2 - width / 2), innerWidth - width - 8);
    const above = at.top - height - 8;
    bubble.style.left = `${Math.max(8, left)}px`;
    bubble.style.top = `${above > 8 ? above : at.bottom + 8}px`;
  };
  const tell = (element, text) => {
    about = element;
    bubble.textContent = text;
    bubble.hidden = false;
    put();
  };
  const hush = () => { bubble.hidden = true; };
  // Reaching something by key may scroll the page, and move it below the mouse: what was reached
  // so keeps its bubble.
  const held = () => !bubble.hidden && about.matches(":focus-visible, .here");
  const told = (event) => event.target instanceof Element && event.target.closest("[data-tip]");
  for (const kind of ["mouseover", "focusin", "click"]) {
    document.addEventListener(kind, (event) => {
      const element = told(event);
      if (element) tell(element, element.dataset.tip);
      else if (kind === "click" || (kind === "mouseover" && !held())) hush();
    });
  }
  document.addEventListener("focusout", hush);
  document.addEventListener("scroll", () => (held() ? put() : hush()), { passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hush(); });

  // Tables: a header's button sorts by its column; what is not a number goes last.
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const key = (row) => row.cells[column].dataset.value;
        const rows = [...table.tBodies[0].rows].sort((one, other) => {
          const [a, b] = [key(one), key(other)];
          if (a === "" || b === "") return (a === "") - (b === "");
          const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
          return up ? order : -order;
        });
        table.tBodies[0].append(...rows);
      });
    });
  }

  // Charts, drawn when they come near the window, in the colours of the page.
  const colour = (name) => {
    const probe = make("span");
    probe.style.color = `var(${name})`;
    document.body.append(probe);
    const value = getComputedStyle(probe).color;
    probe.remove();
    return value;
  };
  const titled = (own, axis) => ({ ...own, ...axis, title: { ...own.title, font: { size: 12.5 } } });
  const dress = (layout) => {
    const [ink, soft, grid, card] = ["--ink", "--soft", "--grid", "--card"].map(colour);
    const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, tickcolor: grid };
    return {
      ...layout,
      xaxis: titled(layout.xaxis, axis),
      yaxis: titled(layout.yaxis, axis),
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: soft },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 62, r: 14, t: 34, b: 48 }, // the toolbar stands above the points
      showlegend: false, // the page has a list of the series, which can wrap and be reached by key
      hoverlabel: { bgcolor: card, bordercolor: grid, font: { color: ink }, align: "left" },
    };
  };
  const plots = [...document.querySelectorAll(".plot")];
  const draw = (plot) => {
    const chart = data.charts[plot.dataset.chart];
    plot.drawn = Plotly.newPlot(plot, chart.data, dress(chart.layout), {
      responsive: true,
      displaylogo: false,
      displayModeBar: "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
      toImageButtonOptions: { filename: chart.key, scale: 2 },
    });
  };
  for (const button of document.querySelectorAll(".key button")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") === "false";
      button.setAttribute("aria-pressed", shown);
      const plot = button.closest("figure").querySelector(".plot");
      const traces = JSON.parse(button.dataset.traces);
      if (plot.drawn) plot.drawn.then(() => Plotly.restyle(plot, { visible: shown }, traces));
    });
  }
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "600px" });
  plots.forEach((plot) => near.observe(plot));

  // Light and dark: as the system says, until the button says otherwise.
  const system = matchMedia("(prefers-color-scheme: dark)");
  const saved = () => { try { return localStorage.getItem("kfade-theme"); } catch { return null; } };
  const keep = (theme) => { try { localStorage.setItem("kfade-theme", theme); } catch { /* file:// */ } };
  const repaint = () => plots.filter((plot) => plot.drawn).forEach((plot) => {
    Plotly.relayout(plot, dress(plot.layout));
  });
  if (saved()) root.dataset.theme = saved();
  document.getElementById("theme").addEventListener("click", () => {
    const now = root.dataset.theme || (system.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    keep(root.dataset.theme);
    repaint();
  });
  system.addEventListener("change", repaint);

  // Lists of texts: filtered, ordered, shown a few at a time.
  const list = (kind, page, orders, card) => {
    const place = document.querySelector(`[data-list="${kind}"]`);
    if (!place) return;
    const controls = document.querySelector(`[data-controls="${kind}"]`);
    const more = document.querySelector(`[data-more="${kind}"]`);
    const [find, part, order] = ["find", "part", "order"].map((name) => controls.elements[name]);
    const parts = [...new Set(data[kind].map((item) => item.part))];
    if (parts.length > 1) part.append(new Option("all", ""));
    parts.forEach((name) => part.append(new Option(name, name)));
    let chosen = [];
    const show = (count) => {
      const from = place.children.length;
      place.append(...chosen.slice(from, from + count).map(card));
      more.hidden = place.children.length >= chosen.length;
    };
    const choose = () => {
      const words = find.value.trim().toLowerCase();
      chosen = data[kind].filter((item) => (!part.value || item.part === part.value)
        && (!words || item.texts.some((text) => text.toLowerCase().includes(words))));
      const key = orders[order.value];
      chosen.sort((one, other) => key(one) - key(other));
      place.replaceChildren();
      controls.querySelector("output").textContent = `${chosen.length} of ${data[kind].length}`;
      show(page);
    };
    controls.addEventListener("input", choose);
    controls.addEventListener("submit", (event) => event.preventDefault());
    more.addEventListener("click", () => show(page));
    choose();
  };

  const article = (title, facts) => {
    const [box, head] = [make("article"), make("header")];
    head.append(make("h3", "", title), make("span", "facts", facts));
    box.append(head);
    return box;
  };
  const side = (name, text, className) => {
    const box = make("div", className);
    box.append(make("h4", "", name), make("p", "", text || "(nothing)"));
    return box;
  };
  (data.generations || []).forEach((item, index) => {
    item.index = index;
    item.texts = [item.prompt, item.expected, item.before, item.after].filter(Boolean);
  });
  list("generations", 8, {
    index: (item) => item.index,
    lost: (item) => -(item.change === null ? -1 : item.change),
  }, (item) => {
    const box = article(item.prompt, [item.part, item.facts].filter(Boolean).join(" · "));
    const sides = make("div", "sides");
    if (item.expected) sides.append(side("Expected", item.expected));
    if (item.before !== null) sides.append(side("Before", item.before));
    sides.append(side("After", item.after, "after"));
    box.append(sides);
    return box;
  });

  // Tokens on a logarithmic scale from 0.001 to 10 nats.
  const strength = (kl) => Math.min(1, Math.max(0, (Math.log10(Math.max(kl, 1e-9)) + 3) / 4));
  const visible = (token) => token.replace(/\n/g, "↵\n").replace(/\t/g, "⇥");
  const spoken = document.getElementById("spoken"); // to those who do not see the bubble
  const say = (token, kl) => `${JSON.stringify(token)}\n${short(kl)} nats`;
  (data.completions || []).forEach((item) => {
    item.texts = [item.prompt, item.tokens.join("")];
    item.max = Math.max(...item.values);
  });
  list("completions", 6, {
    mean: (item) => -item.mean,
    least: (item) => item.mean,
    max: (item) => -item.max,
    length: (item) => -item.tokens.length,
  }, (item) => {
    const facts = `${item.part} · mean ${short(item.mean)}, highest ${short(item.max)} nats · ${item.tokens.length} tokens`;
    const box = article(item.prompt, facts);
    const text = make("p", "tokens");
    text.tabIndex = 0;
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", "Completion; the arrow keys go from token to token");
    item.tokens.forEach((token, index) => {
      const span = make("span", "", visible(token));
      span.style.background = `rgb(224 96 48 / ${(0.72 * strength(item.values[index])).toFixed(3)})`;
      span.dataset.tip = say(token, item.values[index]);
      text.append(span);
    });
    text.addEventListener("keydown", (event) => {
      const turn = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!turn) return;
      event.preventDefault();
      const spans = [...text.children];
      const now = spans.findIndex((span) => span.classList.contains("here"));
      const next = spans[Math.min(Math.max(0, now + turn), spans.length - 1)];
      spans.forEach((span) => span.classList.toggle("here", span === next));
      next.scrollIntoView({ block: "nearest" });
      tell(next, next.dataset.tip);
      spoken.textContent = next.dataset.tip;
    });
    text.addEventListener("blur", () => [...text.children].forEach((span) => span.classList.remove("here")));
    box.append(text);
    return box;
  });
})();
