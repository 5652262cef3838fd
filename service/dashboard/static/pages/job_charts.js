// The curves of one job. The server sends at most RESOLUTION points however long the training was, then what is new.

import { get, optional } from "../api.js";
import { curves } from "../chart.js";
import { h, section } from "../dom.js";
import { percent, percentTick } from "../format.js";
import { histogram } from "../histogram.js";

const RESOLUTION = 300;
const PERCENT = { format: percent, axis: percentTick };
const CHARTS = [
  ["Raw NLL and the objective's own loss", [["raw NLL", "nll"], ["objective loss", "objective_loss"], ["held-out NLL", "valid_nll"]]],
  ["Mean weight of a token", [["mean weight", "mean_weight"], ["effective sample size", "effective_sample_size"], ["share below 0.1", "share_p_below_01"]]],
  ["NLL of ending the turn", [["EOS NLL", "eos_nll"], ["entropy", "entropy"]]],
  ["Token accuracy", [["training", "token_accuracy"], ["held-out", "valid_token_accuracy"], ["benchmark probe", "probe_value"]], PERCENT],
  ["Throughput", [["tokens per second", "tokens_per_second"]]],
  ["Gradient norm", [["gradient norm", "grad_norm"]]],
];
const MORE = [
  ["Learning rate", [["learning rate", "learning_rate"]]],
  ["Peak memory in GiB", [["peak memory", "peak_memory_gib"]]],
  ["Time spent waiting for data", [["share of a step", "data_wait_share"]], PERCENT],
];
const KEYS = [...new Set([...CHARTS, ...MORE].flatMap(([, series]) => series.map(([, key]) => key)))];

export function jobCharts(path, page) {
  const drawn = (all) => all.map(([title, series, options]) => curves(title, series.map(([name, key]) => ({ name, key })), options));
  const [main, more] = [drawn(CHARTS), drawn(MORE)];
  const charts = [...main, ...more];
  const bins = histogram("Probability of the target tokens");
  const binsPart = section("Probability of the target tokens, on a fixed set of rows", { hidden: true }, bins.element);
  const columns = (some) => h("div.columns", null, some.map((chart) => chart.element));
  const element = h("div.page", null,
    section("Curves", null, columns(main), h("details", null, h("summary", null, "More curves"), columns(more))), binsPart);
  let points = [];
  let histograms = 0;

  const load = async (job) => {
    const last = points.at(-1)?.step;
    const whole = last === undefined || points.length > 2 * RESOLUTION || job.attempt !== load.attempt;
    load.attempt = job.attempt;
    const query = { keys: KEYS.join(","), resolution: RESOLUTION, from_step: whole ? 0 : last + 1 };
    const fresh = (await get(`${path}/metrics`, query, page.signal)).data;
    points = whole ? fresh : [...points, ...fresh];
    if (whole || fresh.length) for (const chart of charts) chart.update(points);
    const some = (await optional(`${path}/histograms`, {}, page.signal))?.data ?? [];
    binsPart.hidden = !some.length;
    if (some.length !== histograms) bins.update(some);
    histograms = some.length;
  };
  return { element, load };
}
