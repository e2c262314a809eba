// Tables by DataTables, pictures by plotly; what they show stands in the page.
"use strict";
const parry = {};

parry.draw = (place, figure) => {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
  const paper = style.getPropertyValue("--card").trim();
  const small = place.clientWidth < 520;
  const axis = (given) => ({ gridcolor: line, linecolor: line, zeroline: false, fixedrange: small, ...given });
  const layout = {
    margin: { l: small ? 44 : 56, r: 12, t: 12, b: 48 }, height: 460,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: "system-ui, sans-serif", color: ink, size: 13 },
    hoverlabel: { bgcolor: paper, font: { color: ink } }, ...figure.layout,
    xaxis: axis(figure.layout.xaxis), yaxis: axis(figure.layout.yaxis),
  };
  if (small && layout.yaxis.type === "category") layout.yaxis.tickfont = { size: 10 };
  layout.legend = { y: 1, x: 1.02 };
  if (small && !figure.layout.height) {  // a line of the legend for each name, below the axis and its title
    const lines = 19 * figure.data.filter((trace) => trace.name).length;
    layout.legend = { yref: "container", y: 0, yanchor: "bottom", x: 0, tracegroupgap: 0, font: { size: 11 } };
    layout.height = 340 + lines;
    layout.margin.b = 60 + lines;
  }
  for (const trace of figure.data) if (trace.error_x) trace.error_x.color = ink;
  return Plotly.react(place, figure.data, layout, { responsive: true, displayModeBar: false });
};

parry.charts = () => {
  for (const place of document.querySelectorAll("[data-figure]")) {
    parry.draw(place, JSON.parse(document.getElementById(place.dataset.figure).textContent));
  }
};

parry.table = (table) => {
  const narrow = matchMedia("(max-width: 44rem)").matches;
  const heads = [...table.tHead.rows[0].cells];
  const hidden = heads.flatMap((head, place) =>
    "extra" in head.dataset || (narrow && "wide" in head.dataset) ? [place] : []);
  const plain = table.dataset.table === "plain";
  const label = (_, place) => {  // a head is anybody's text, and DataTables would read it as HTML
    const text = document.createElement("span");
    text.textContent = heads[place].dataset.head;
    return text.innerHTML;
  };
  const paging = !plain && table.tBodies[0].rows.length > 25;
  return new tables.default(table, {
    order: [], autoWidth: false, paging, pageLength: 25,
    searching: !plain, info: false, columnDefs: [{ targets: hidden, visible: false }],
    layout: plain ? { topStart: null, topEnd: null, bottomStart: null, bottomEnd: null } : {
      topStart: "search", bottomStart: null, bottomEnd: paging ? "paging" : null,
      topEnd: { buttons: [{ extend: "colvis", text: "Columns", columnText: label }] },
    },
    language: { search: "", searchPlaceholder: "Filter" },
  });
};

document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("[data-table]")) parry.table(table);
  if (!window.Plotly) return;
  parry.charts();
  document.addEventListener("theme", parry.charts);
});
