// Draws each figure from the JSON beside it, a hidden one when it is first shown.
"use strict";

function draw(plot) {
  if (plot.hidden || plot.dataset.drawn) return;
  const source = plot.querySelector("script");
  const figure = JSON.parse(source.textContent);
  plot.dataset.drawn = "yes";
  Plotly.newPlot(plot, figure.data, figure.layout, { displayModeBar: false, responsive: true });
}

document.querySelectorAll(".plot").forEach(draw);

document.querySelectorAll("button[data-show]").forEach((button) => {
  button.addEventListener("click", () => {
    for (const other of button.parentElement.children) other.setAttribute("aria-pressed", String(other === button));
    document.getElementById(button.dataset.hide).hidden = true;
    const shown = document.getElementById(button.dataset.show);
    shown.hidden = false;
    draw(shown);
  });
});
