"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const state = { block: data.blocks.length - 1, a: 0, b: Math.min(1, data.classes.length - 1), channel: 0 };
  const number = (x, digits = 3) => (x === null || x === undefined ? "–" : x.toFixed(digits));
  const percent = (x) => (x === null || x === undefined ? "–" : (100 * x).toFixed(1) + "%");
  const block = () => data.blocks[state.block];

  // Text only ever goes in as text, so that a class may be called <b> or worse.
  const cell = (text, tag = "td") => {
    const element = document.createElement(tag);
    element.textContent = text;
    return element;
  };
  const button = (text, label, action) => {
    const element = cell(text, "button");
    element.type = "button";
    element.setAttribute("aria-label", label);
    element.addEventListener("click", action);
    return element;
  };
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const say = (text) => { at("said").textContent = text; };

  const dark = () => document.documentElement.dataset.theme === "dark";
  const colours = () => (dark() ? ["#56b4e9", "#e69f00", "#9aa0a6"] : ["#0072b2", "#d55e00", "#6b7075"]);
  const fade = (hex) => hex + "33";
  const layout = (extra) => {
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink").trim();
    const line = style.getPropertyValue("--line").trim();
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, family: "system-ui, sans-serif", size: 13 },
      margin: { l: 48, r: 12, t: 12, b: 44 }, dragmode: false,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      ...extra, xaxis: { ...axis, ...extra.xaxis }, yaxis: { ...axis, ...extra.yaxis },
    };
  };
  const settings = { responsive: true, displayModeBar: false };
  const draw = (id, traces, extra) => Plotly.react(at(id), traces, layout(extra), settings).then(() => {
    // The chart's own label says what it shows; its hundreds of parts say nothing.
    for (const part of at(id).children) part.setAttribute("aria-hidden", "true");
    at("js-plotly-tester")?.setAttribute("aria-hidden", "true");
  });

  const overview = () => {
    const main = colours();
    draw("overview", [{
      type: "bar", x: data.blocks.map((_, i) => i), y: data.blocks.map((b) => 100 * b.between),
      marker: { color: data.blocks.map((_, i) => (i === state.block ? main[1] : main[0])) },
      text: data.blocks.map((b) => plain(b.name)), textposition: "none",
      hovertemplate: "%{text}: %{y:.1f}%<extra></extra>",
    }], {
      xaxis: { title: { text: "block" }, tickvals: data.blocks.map((_, i) => i).filter((i) => data.blocks.length < 9 || i % Math.ceil(data.blocks.length / 8) === 0), ticktext: data.blocks.map((b) => plain(b.name.replace(/\.se$/, ""))).filter((_, i) => data.blocks.length < 9 || i % Math.ceil(data.blocks.length / 8) === 0) },
      yaxis: { title: { text: "between classes (%)" }, rangemode: "tozero" },
      showlegend: false,
    });
    for (const [index, row] of [...at("blocks").rows].entries()) {
      row.setAttribute("aria-current", index === state.block ? "true" : "false");
    }
  };

  const fillBlocks = () => {
    const widest = Math.max(...data.blocks.map((b) => b.between), 1e-9);
    for (const [index, b] of data.blocks.entries()) {
      const row = document.createElement("tr");
      const head = document.createElement("th");
      head.scope = "row";
      head.append(button(b.name, `Show block ${b.name}`, () => choose(index)));
      const share = document.createElement("td");
      const bar = document.createElement("span");
      bar.className = "bar";
      bar.style.width = `${(3 * b.between / widest).toFixed(2)}rem`;
      bar.setAttribute("aria-hidden", "true");
      share.append(bar, percent(b.between));
      row.append(head, cell(b.stage), cell(b.channels), cell(number(b.average)), cell(number(b.deviation)), share,
        cell(percent(b.saturation && b.saturation[0])), cell(percent(b.saturation && b.saturation[1])));
      at("blocks").append(row);
    }
    at("overview").on("plotly_click", (event) => choose(event.points[0].x));
  };

  const distance = (b, c) => {
    const [i, j] = [state.a, state.b];
    const within = (b.count[i] * b.std[i][c] ** 2 + b.count[j] * b.std[j][c] ** 2) / Math.max(b.count[i] + b.count[j], 1);
    return Math.abs(b.mean[i][c] - b.mean[j][c]) / Math.sqrt(within + 1e-12);
  };

  const showBlock = () => {
    const b = block();
    const main = colours();
    at("block-title").textContent = `Block ${b.name}`;
    at("block-facts").textContent = `${b.channels} channels, gate ${b.gate}, stage ${b.stage}; ${percent(b.between)} of the gates' variance lies between classes.`;
    const order = [...Array(b.channels).keys()];
    if (at("sorted").checked) order.sort((p, q) => b.overall[p] - b.overall[q]);
    const x = order.map((_, i) => i);
    const traces = [{
      x, y: order.map((c) => b.overall[c]), name: `mean of all ${data.totalClasses} classes`, mode: "lines",
      line: { color: fade(main[2]).slice(0, 7) + "88", width: 6 }, customdata: order,
      hovertemplate: "channel %{customdata}: %{y:.3f}<extra>all</extra>",
    }];
    for (const [slot, k] of [[0, state.a], [1, state.b]]) {
      const name = plain(data.classes[k]);
      if (at("band").checked) {
        const up = order.map((c) => b.mean[k][c] + b.std[k][c]);
        const down = order.map((c) => b.mean[k][c] - b.std[k][c]);
        traces.push({ x: x.concat([...x].reverse()), y: up.concat(down.reverse()), fill: "toself", fillcolor: fade(main[slot]), line: { width: 0 }, mode: "lines", hoverinfo: "skip", showlegend: false });
      }
      traces.push({
        x, y: order.map((c) => b.mean[k][c]), name, mode: "lines",
        line: { color: main[slot], width: 1.8, dash: slot ? "dash" : "solid" }, customdata: order,
        hovertemplate: `channel %{customdata}: %{y:.3f}<extra>${name.replaceAll("%{", "%&#123;")}</extra>`,
      });
    }
    draw("channels", traces, { xaxis: { title: { text: at("sorted").checked ? "channels by mean gate" : "channel" } }, yaxis: { title: { text: "mean gate" } } });

    at("head-a").textContent = data.classes[state.a];
    at("head-b").textContent = data.classes[state.b];
    at("separating-caption").textContent = `The channels of ${b.name} that tell ${data.classes[state.a]} from ${data.classes[state.b]} best: difference of the means in units of the spread within both classes.`;
    const best = [...Array(b.channels).keys()].sort((p, q) => distance(b, q) - distance(b, p)).slice(0, 10);
    at("separating").replaceChildren(...best.map((c) => {
      const row = document.createElement("tr");
      const head = document.createElement("th");
      head.scope = "row";
      head.append(button(String(c), `Show channel ${c}`, () => showChannel(c, true)));
      row.append(head, cell(number(b.mean[state.a][c])), cell(number(b.mean[state.b][c])),
        cell(number(b.mean[state.a][c] - b.mean[state.b][c])), cell(number(distance(b, c), 2)));
      return row;
    }));
    return best[0];
  };

  const showChannel = (channel, moved) => {
    const b = block();
    const c = Math.min(Math.max(0, Math.round(channel) || 0), b.channels - 1);
    const main = colours();
    state.channel = c;
    at("channel-title").textContent = `Channel ${c} of ${b.name}`;
    at("channel").value = c;
    at("channel").max = b.channels - 1;
    at("channel-range").textContent = `0 to ${b.channels - 1}`;
    at("channel-facts").textContent = `Mean gate ${number(b.overall[c])}, median ${number(b.quantiles[1][c])}, 5% to 95% of the images ${number(b.quantiles[0][c])} to ${number(b.quantiles[2][c])}; ${percent(b.betweenBy[c])} of its variance lies between classes.`;
    draw("classes", [{
      type: "bar", x: data.classes.map((_, k) => k), y: data.classes.map((_, k) => b.mean[k][c]),
      error_y: { type: "data", array: data.classes.map((_, k) => b.std[k][c]), visible: true, color: main[2] },
      marker: { color: data.classes.map((_, k) => (k === state.a ? main[0] : k === state.b ? main[1] : main[2])) },
      text: data.classes.map(plain), textposition: "none", hovertemplate: "%{text}: %{y:.3f}<extra></extra>",
    }], {
      xaxis: { tickvals: data.classes.map((_, k) => k), ticktext: data.classes.map(plain) },
      yaxis: { title: { text: "mean gate" } }, showlegend: false,
    });
    at("class-rows").replaceChildren(...data.classes.map((name, k) => {
      const row = document.createElement("tr");
      const head = cell(name, "th");
      head.scope = "row";
      row.append(head, cell(number(b.mean[k][c])), cell(number(b.std[k][c])));
      return row;
    }));
    const shown = (b.top[c] || []).filter(([image]) => data.images[image]);
    at("images").replaceChildren(...shown.map(([image, gate]) => {
      const item = document.createElement("li");
      const picture = document.createElement("img");
      picture.src = data.images[image].source;
      picture.alt = `Image ${image}, ${data.images[image].label}`;
      picture.loading = "lazy";
      item.append(picture, cell(data.images[image].label, "span"), cell(`gate ${number(gate)}`, "span"));
      return item;
    }));
    if (!shown.length) at("images").append(cell("No images were kept for this channel; raise --images.", "li"));
    if (moved) {
      say(`Channel ${c} of ${b.name}`);
      at("channel-title").focus({ preventScroll: false });
    }
  };

  const choose = (index, quiet) => {
    state.block = index;
    overview();
    const best = showBlock();
    showChannel(best, false);
    if (!quiet) {
      say(`Block ${block().name}`);
      at("block-title").focus({ preventScroll: false });
    }
  };

  const theme = (name) => {
    document.documentElement.dataset.theme = name;
    at("theme").textContent = `Switch to ${name === "dark" ? "light" : "dark"} colours`;
  };
  const redraw = () => { overview(); showBlock(); showChannel(state.channel, false); };

  theme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  for (const [id, key] of [["class-a", "a"], ["class-b", "b"]]) {
    for (const [index, name] of data.classes.entries()) {
      const option = cell(name, "option");
      option.value = index;
      at(id).append(option);
    }
    at(id).value = state[key];
    at(id).addEventListener("change", () => {
      state[key] = Number(at(id).value);
      showBlock();
      showChannel(state.channel, false);
      say(`Comparing ${data.classes[state.a]} with ${data.classes[state.b]}`);
    });
  }
  at("band").addEventListener("change", showBlock);
  at("sorted").addEventListener("change", showBlock);
  at("pick").addEventListener("submit", (event) => event.preventDefault());
  at("pick-channel").addEventListener("submit", (event) => {
    event.preventDefault();
    showChannel(Number(at("channel").value), true);
  });
  at("theme").addEventListener("click", () => { theme(dark() ? "light" : "dark"); redraw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => { theme(event.matches ? "dark" : "light"); redraw(); });
  overview();
  fillBlocks();
  choose(state.block, true);
})();
