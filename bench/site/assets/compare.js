// Two entries on the samples that both have met. Their outcomes are loaded as scripts, which pages may read from files.
"use strict";
(() => {
  const boards = JSON.parse(document.getElementById("boards").textContent);
  const [board, a, b] = ["board", "a", "b"].map((id) => document.getElementById(id));
  const said = document.getElementById("said"), found = document.getElementById("found");
  const loaded = {};
  const COLOURS = ["#0072b2", "#d9480f"], POINTS = 60, EXACT = 2000;

  parry.entry = (id, data) => loaded[id](data);
  const load = (id) => loaded[id]?.promise ?? (() => {
    const promise = new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `data/${id}.js`;
      script.onerror = () => reject(new Error(`data/${id}.js cannot be read`));
      loaded[id] = resolve;
      document.head.append(script);
    });
    loaded[id].promise = promise;
    return promise;
  })();

  // Statistics: as bench/report/stats.py and sequence.py have them, which say whose they are.
  const wilson = (successes, n) => {
    const z = 1.959963984540054, share = successes / n, middle = (share + z * z / (2 * n)) / (1 + z * z / n);
    const half = z * Math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n);
    return [successes === 0 ? 0 : middle - half, successes === n ? 1 : middle + half];
  };
  const logFactorials = [0];
  const logFactorial = (n) => {
    for (let k = logFactorials.length; k <= n; k++) logFactorials.push(logFactorials[k - 1] + Math.log(k));
    return logFactorials[n];
  };
  const sequence = (successes, n) => {  // where outcomes could have decided how many samples there are
    const failures = n - successes, mixture = logFactorial(successes) + logFactorial(failures) - logFactorial(n + 1);
    const least = (hits, misses) => {
      let low = 0, high = hits / n;
      for (let halving = 0; hits && halving < 60; halving++) {
        const middle = (low + high) / 2;
        const alone = hits * Math.log(middle) + (misses ? misses * Math.log1p(-middle) : 0);
        if (mixture - alone >= -Math.log1p(-0.95)) low = middle; else high = middle;
      }
      return low;
    };
    return [least(successes, failures), 1 - least(failures, successes)];
  };
  const even = (value) => {  // rounded; a half, of two networks, to the even number
    const low = Math.floor(value);
    return value - low === 0.5 ? low + (low % 2) : Math.round(value);
  };
  const interval = (share, n, stopped) => (stopped ? sequence : wilson)(even(share * n), n);
  const mcnemar = (more, less) => {  // twice the smaller tail of the binomial distribution of the pairs that differ
    const n = more + less;
    let term = -n * Math.LN2, sum = 0;  // the logarithm of the probability of 0, then of 1, ...
    for (let k = 0; k <= Math.min(more, less); k++) {
      sum += Math.exp(term);
      term += Math.log((n - k) / (k + 1));
    }
    return n ? Math.min(1, 2 * sum) : 1;
  };
  const paired = (differences) => {  // the percentiles of the bootstrap: exact for few samples, else its normal limit
    const n = differences.length, counts = new Map();
    for (const each of differences) counts.set(each, (counts.get(each) ?? 0) + 1);
    const mean = differences.reduce((sum, each) => sum + each, 0) / n;
    if (n > EXACT || [...counts.keys()].some((each) => !Number.isInteger(each))) {
      const sd = Math.sqrt(differences.reduce((sum, each) => sum + (each - mean) ** 2, 0)) / n;
      return [mean - 1.959963984540054 * sd, mean + 1.959963984540054 * sd];
    }
    const [down, same, up] = [-1, 0, 1].map((each) => (counts.get(each) ?? 0) / n);
    let mass = new Float64Array(2 * n + 1);
    mass[n] = 1;
    for (let draw = 1; draw <= n; draw++) {
      const next = new Float64Array(2 * n + 1);
      for (let place = n - draw; place <= n + draw; place++) {
        next[place] = same * mass[place] + up * (mass[place - 1] ?? 0) + down * (mass[place + 1] ?? 0);
      }
      mass = next;
    }
    const at = (level) => {
      let sum = 0, place = 0;
      while ((sum += mass[place]) < level && place < 2 * n) place++;
      return (place - n) / n;
    };
    return [at(0.025), at(0.975)];
  };

  const holm = (ps) => {  // each adjusted for all
    const adjusted = Array(ps.length);
    let least = 0;
    [...ps.keys()].sort((x, y) => ps[x] - ps[y]).forEach((which, place) => {
      least = Math.max(least, Math.min(1, ps[which] * (ps.length - place)));
      adjusted[which] = least;
    });
    return adjusted;
  };
  parry.statistics = { wilson, sequence, mcnemar, paired, holm };

  const named = (row) => `${row.attack}${row.network === null && row.seed ? `, seed ${row.seed}` : ""}`;
  const key = (row) => JSON.stringify([row.attack, row.seed]);
  const met = (data) => {  // by attack and seed; of several rows, that with the most queries and samples
    const result = new Map();
    for (const row of [...data.rows].sort((x, y) => x.budget - y.budget || x.right.length - y.right.length)) {
      result.set(key(row), { ...row, place: new Map(data.ids[row.ids].map((id, place) => [id, place])) });
    }
    return result;
  };
  const stands = {  // of one sample of a row, after so many queries
    query: (row, place, queries) => row.hits[place] === -1 || row.hits[place] > queries,
    "white-box": (row, place) => row.hits[place] === -1 && row.right[place] === "1",
    data: (row, place) => row.right[place] === "1",
    clean: (row, place) => row.hits[place] !== 0,
    final: (row, place) => row.hits[place] !== 0 && row.right[place] === "1",
  };
  // For each sample, the share of networks on which it is right under all rows.
  const outcome = (pairs, side, ids, right) => {
    const networks = Map.groupBy(pairs, (pair) => pair[side].network);
    return ids.map((id) => {
      let sum = 0;
      for (const group of networks.values()) {
        sum += group.every((pair) => right(pair[side], pair[side].place.get(id), pair.budget));
      }
      return sum / networks.size;
    });
  };
  const mean = (values) => values.reduce((sum, each) => sum + each, 0) / values.length;

  const versus = (name, pairs, ids, track, whole) => {
    const line = (at, right) => {
      const sides = [0, 1], [x, y] = sides.map((side) => outcome(pairs, side, ids, right));
      const more = x.filter((each, place) => each > y[place]).length, less = x.filter((each, place) => each < y[place]).length;
      const stopped = sides.map((side) => pairs.some((pair) => pair[side].sequence));
      return { name, at, stopped, x: mean(x), y: mean(y), n: ids.length, more, less,
               ends: paired(x.map((each, place) => each - y[place])), p: mcnemar(more, less) };
    };
    if (track === "certificate") {
      return pairs[0][0].radii.map((each) => line(`r=${each}`, (row, place) => row.radius[place] >= each));
    }
    if (track !== "query") return [line(track === "data" ? "test" : "robust", stands[track])];
    const most = Math.max(...pairs.map((pair) => pair.budget));
    const budgets = [...new Set([100, 1000].filter((each) => each < most).concat(most))];
    const alike = pairs.every((pair) => pair[0].budget === pair[1].budget);
    if (!whole) return [line(`@${most}`, (row, place, budget) => stands.query(row, place, budget))];
    return [
      line("clean", stands.clean),
      ...budgets.map((each) => line(`@${each}`, (row, place, budget) => stands.query(row, place, Math.min(each, budget)))),
      ...(alike ? [line("final", stands.final)] : []),
    ];
  };

  const curves = (pairs, ids, names) => {
    const most = Math.max(...pairs.map((pair) => pair.budget));
    const queries = [...new Set([...Array(POINTS).keys()].map((i) => Math.round(most ** (i / (POINTS - 1)))))];
    const data = names.flatMap((name, side) => {
      const shares = queries.map((each) =>
        mean(outcome(pairs, side, ids, (row, place, budget) => stands.query(row, place, Math.min(each, budget)))));
      const stopped = pairs.some((pair) => pair[side].sequence);
      const ends = shares.map((share) => interval(share, ids.length, stopped).map((end) => 100 * end));
      const colour = COLOURS[side];
      return [
        { x: [...queries, ...[...queries].reverse()], y: [...ends.map((end) => end[1]), ...ends.map((end) => end[0]).reverse()],
          fill: "toself", fillcolor: `${colour}22`, line: { width: 0 }, mode: "lines", hoverinfo: "skip", showlegend: false },
        { x: queries, y: shares.map((share) => 100 * share), text: ends.map((end) => `${end[0].toFixed(0)} to ${end[1].toFixed(0)}`),
          mode: "lines", line: { color: colour, width: 3 }, name: `${"AB"[side]}: ${plain(name)}`, hovertemplate: "%{x} queries: %{y:.1f} % [%{text}]" },
      ];
    });
    return { data, layout: {
      xaxis: { type: "log", dtick: 1, exponentformat: "none", title: { text: "queries of each image" } },
      yaxis: { range: [0, 100], title: { text: "robust accuracy (%)" } } } };
  };

  const plain = (name) => {  // plotly reads markup in names
    const cut = name.length > 30 ? `${name.slice(0, 29)}…` : name;
    return cut.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  };
  const share = (value, n, stopped) => {
    const [low, high] = interval(value, n, stopped).map((end) => (100 * end).toFixed(0));
    return `${(100 * value).toFixed(1)} [${low}, ${high}]`;
  };
  const signed = (value, digits) => `${value < 0 ? "−" : "+"}${Math.abs(100 * value).toFixed(digits)}`;
  const fill = (lines) => {
    const rows = lines.map((line) => {
      const row = document.createElement("tr");
      const texts = [line.name, line.at, share(line.x, line.n, line.stopped[0]), share(line.y, line.n, line.stopped[1]),
        `${signed(line.x - line.y, 1)} [${signed(line.ends[0], 0)}, ${signed(line.ends[1], 0)}]`,
        line.more, line.less, line.adjusted < 1e-4 ? "<0.0001" : line.adjusted.toFixed(4)];
      texts.forEach((text, place) => {
        const cell = row.insertCell();
        cell.textContent = text;
        if (place > 1) cell.className = "number";
      });
      if (line.adjusted < 0.05) row.className = "differs";
      return row;
    });
    document.querySelector("#pairs tbody").replaceChildren(...rows);
  };

  let drawn = null;
  const show = async () => {
    const here = boards.find((each) => each.id === board.value);
    const names = [a, b].map((select) => select.selectedOptions[0]?.textContent ?? "");
    found.hidden = true;
    if (a.value === b.value) { said.textContent = "Choose two that differ."; return; }
    try { history.replaceState(null, "", `#${a.value},${b.value}`); } catch { /* pages from files, in some browsers */ }
    let both;
    let apart = [];
    try {
      const data = await Promise.all([load(a.value), load(b.value)]);
      const known = data.map((each) => new Set([...each.apart, ...each.rows.map((row) => row.attack)]));
      apart = [...new Set(data.flatMap((each) => each.apart))].filter((attack) => known.every((names) => names.has(attack)));
      both = data.map(met);
    } catch (error) { said.textContent = error.message; return; }
    const pairs = [...both[0].keys()].filter((each) => both[1].has(each)).map((each) => {
      const pair = [both[0].get(each), both[1].get(each)];
      pair.budget = Math.min(pair[0].budget, pair[1].budget);
      return pair;
    });
    const ids = pairs.length ? [...pairs[0][0].place.keys()].filter((id) =>
      pairs.every((pair) => pair[0].place.has(id) && pair[1].place.has(id))) : [];
    if (!ids.length) { said.textContent = "They have no attack and no sample in common."; return; }
    const counted = pairs.filter((pair) => !pair[0].control);
    const groups = Map.groupBy(pairs, (pair) => named(pair[0]));
    const pooled = !["data", "certificate"].includes(here.track) && new Set(counted.map((pair) => named(pair[0]))).size > 1 && !apart.length;
    const lines = [...groups].sort().flatMap(([name, group]) => versus(group[0][0].control ? `${name} ⇄` : name, group, ids, here.track, !pooled));
    const worst = pooled ? versus(`worst of ${new Set(counted.map((pair) => named(pair[0]))).size}`, counted, ids, here.track, true) : [];
    said.textContent = `A = ${names[0]}, B = ${names[1]}: ${ids.length} images in common.`;
    if (apart.length) {
      said.textContent += ` No worst case: ${apart.join(", ")} has not met all of its images. bench compare says what can be known.`;
    }
    const all = [...worst, ...lines];
    holm(all.map((line) => line.p)).forEach((p, place) => { all[place].adjusted = p; });
    fill(all);
    found.hidden = false;
    const figure = document.querySelector("#found figure");
    figure.hidden = here.track !== "query" || apart.length > 0;
    drawn = figure.hidden ? null : curves(pooled ? counted : pairs, ids, names);
    if (drawn) parry.draw(document.getElementById("curves"), drawn);
  };
  const options = (select, listed) => select.replaceChildren(...listed.map((each) => new Option(each.name, each.id)));
  const choose = (first, second) => {
    const { entries } = boards.find((each) => each.id === board.value);
    options(a, entries);
    options(b, entries);
    a.value = first ?? entries[0]?.id;
    b.value = second ?? entries.find((each) => each.id !== a.value)?.id ?? a.value;
    show();
  };

  document.addEventListener("DOMContentLoaded", () => {
    if (!boards.length) { said.textContent = "No board here has two entries."; return; }
    const [first, second] = location.hash.slice(1).split(",").filter(Boolean);
    const asked = boards.find((each) => each.entries.some((entry) => entry.id === first));
    if (asked) board.value = asked.id;
    choose(asked && first, asked && asked.entries.some((entry) => entry.id === second) ? second : undefined);
    board.addEventListener("change", () => choose());
    for (const select of [a, b]) select.addEventListener("change", show);
    document.addEventListener("theme", () => { if (drawn) parry.draw(document.getElementById("curves"), drawn); });
  });
})();
