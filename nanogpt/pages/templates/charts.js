// Draws the figures that the page holds as JSON, in the colours of its theme; check boxes show and hide runs.
(() => {
  const { figures, palettes } = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const dashes = ["solid", "dashdot", "dot"];
  const borders = ["solid", "dashed", "dotted"];
  const boxes = [...document.querySelectorAll(".legend input")];
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const palette = () => palettes[dark.matches ? "dark" : "light"];
  const colour = (run) => palette()[run % palette().length];

  const dash = (run) => Math.floor(run / palette().length) % dashes.length;

  const trace = (line) => {
    const ofRun = line.run !== null;
    return {
      type: "scatter", x: line.x, y: line.y, name: line.name, opacity: line.raw ? 0.3 : 1,
      mode: line.marked ? "lines+markers" : "lines",
      line: {
        width: line.raw ? 0.8 : ofRun ? 1.8 : 1.2,
        color: ofRun ? colour(line.run) : css("--faint"),
        dash: ofRun ? dashes[dash(line.run)] : "dash",
      },
      marker: { size: 5, symbol: ofRun ? "circle" : "x-thin-open" },
      visible: !ofRun || boxes.length === 0 || boxes[line.run].checked,
      hoverinfo: line.quiet ? "skip" : "all",
      hovertemplate: line.quiet ? undefined : "%{y:.4f}",
    };
  };

  const layout = (figure) => {
    const axis = {
      gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, automargin: true,
      ticks: "outside", tickcolor: css("--line"),
    };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, uirevision: "kept",
      font: { family: "system-ui, sans-serif", size: 12, color: css("--text") },
      margin: { l: 48, r: 12, t: 8, b: 44 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--faint"), activecolor: css("--text") },
      hovermode: figure.runs > 6 ? "closest" : "x unified", hoverdistance: -1, // however far apart the points are
      hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--line"), font: { color: css("--text") } },
      xaxis: { ...axis, title: { text: figure.x }, rangemode: "tozero", nticks: 8, hoverformat: figure.x_format },
      yaxis: { ...axis, type: figure.logarithmic ? "log" : "linear", nticks: 8, exponentformat: "none" },
      shapes: figure.stages.map((x) => ({
        type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", layer: "below",
        opacity: 0.5, line: { color: css("--faint"), width: 1, dash: "dot" },
      })),
      annotations: figure.targets.map((target) => ({
        xref: "paper", x: 0.01, xanchor: "left", y: figure.logarithmic ? Math.log10(target) : target, yanchor: "bottom",
        text: `target ${target}`, showarrow: false, font: { size: 12, color: css("--faint") },
      })),
    };
  };

  const draw = () => {
    document.querySelectorAll(".legend i").forEach((swatch, run) => {
      swatch.style.borderTop = `3px ${borders[dash(run)]} ${colour(run)}`;
    });
    return Promise.all(figures.map((figure) => Plotly.react(
      figure.id, figure.lines.map(trace), layout(figure),
      { responsive: true, displaylogo: false, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]] },
    )));
  };

  boxes.forEach((box) => box.addEventListener("change", draw));
  dark.addEventListener("change", draw);
  draw().then(() => { document.documentElement.dataset.drawn = figures.length; });
})();
