// The page of the Curvature tab: asks for runs and their data, and draws them on canvases.
//
// Names, words and numbers come from event files that anybody may have written. They become text by `textContent` and
// `fillText` only, never markup.

// Server.
const POLL = 5000; // milliseconds between questions, at least
const RUNS_IN_A_REQUEST = 16;

// Runs.
const COLOURS = 8; // --run-0 ... in style.css
const MOST_CHOSEN = 8; // runs shown before anybody has chosen
const MOST_READ = 8; // values in the header of a chart; the header counts the others
const EDGE = [0.9, 1.25]; // ratios between which training is called at the edge of stability, as in the words

// Numbers.
const DIGITS = 4; // significant digits
const INTERVAL_DIGITS = 6; // most significant digits of an interval's ends
const PLAIN = [1e-4, 1e6]; // sizes between which numbers are written without a power of ten, as in the words
const SPREAD = 100; // highest over lowest value from which a scale is logarithmic by itself
const WIDE = 1000; // largest over median size from which it is, also where values have both signs
const REACH = {above: 1e8, below: 1e12}; // how far a logarithmic scale reaches from the median size, as factors; arrows mark what lies beyond
const MOST_BESIDE = 4; // further eigenvalues of a run in the box of values where there are several runs
const DEPTH = 100; // how far below the lowest main line a logarithmic scale reaches, as a factor

// Charts, in pixels.
const GUTTER = {left: 60, right: 14, top: 10, bottom: 30};
const NEAR = 6; // between the pointer's measurement and the values shown with it
const BESIDE = 18; // between the pointer and the box of values
const LATER = [{width: 1.4, alpha: 0.75}, {width: 1.2, alpha: 0.5}, {width: 1, alpha: 0.4}]; // lines of λ₂, λ₃ and the rest
const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3]]; // lines of several losses of one run

// Cards.
const SENTENCES = {few: 2, many: 1}; // sentences on a card that are not folded away, for up to two runs and for more
const ALARMS = 2; // sentences in red that begin the words of a run that has failed or diverged
const FAILED = ['failed', 'diverged', 'lost'];
const BEHIND = 0.2; // share of the run after the last measurement from which the card says so

/** Badges on the cards, by the state of a run. */
const BADGES = {
  failed: ['danger', 'failed'],
  diverged: ['danger', 'diverged'],
  below: ['good', 'stable'],
  edge: ['warn', 'edge of stability'],
  beyond: ['danger', 'beyond the edge'],
  risen: ['warn', 'loss has risen'],
  lost: ['danger', 'loss is back up'],
  spiked: ['warn', 'loss has spiked'],
  stuck: ['warn', 'loss has not fallen'],
  jumped: ['warn', 'loss has jumped'],
  unstable: ['warn', 'was unstable'],
};

// --- Small things -------------------------------------------------------------------------------------------------

function el(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children); // strings become text nodes
  return made;
}

/** An object with these entries and nothing else: names such as "constructor" come from files too. */
const table = (entries) => Object.setPrototypeOf(Object.fromEntries(entries), null);
const finite = (values) => values.filter((value) => Number.isFinite(value));
const number = (value) => (value === null ? null : Number(value)); // "NaN" and "Infinity" are strings in JSON
/** The lower median of numbers above zero. */
const median = (sizes) => [...sizes].sort((a, b) => a - b)[(sizes.length - 1) >> 1];
/** A sentence with the minus sign that the charts have. */
const typeset = (sentence) => sentence.replace(/(^|[\s(])-(?=[\d.∞])/g, '$1−');
const superscript = (n) => String(n).replace(/./g, (c) => ({'-': '⁻', 0: '⁰', 1: '¹', 2: '²', 3: '³', 4: '⁴', 5: '⁵', 6: '⁶', 7: '⁷', 8: '⁸', 9: '⁹'})[c]);
const grouped = (n) => (n < 1e4 ? String(n) : String(n).replace(/\B(?=(\d{3})+(?!\d))/g, '\u00a0'));

const isPlain = (size) => size >= PLAIN[0] && size < PLAIN[1];

/** A number as a multiple of a power of ten: 1.2×10⁻⁷, 10³, 1. */
function withPower(value, digits) {
  const [mantissa, exponent] = Math.abs(value).toExponential(digits - 1).split('e');
  const short = mantissa.includes('.') ? mantissa.replace(/\.?0+$/, '') : mantissa;
  const power = {0: '', 1: '10'}[exponent.replace('+', '')] ?? `10${superscript(Number(exponent))}`;
  return (value < 0 ? '−' : '') + (power ? (short === '1' ? power : `${short}×${power}`) : short);
}

/** Labels of the ticks of one axis: powers of ten for all where one of them needs a power. */
function labelled(values, digits) {
  const plain = values.every((value) => value === 0 || isPlain(Math.abs(value)));
  return values.map((value) => ({value, label: plain || value === 0 ? shown(value, digits) : withPower(value, digits)}));
}

/** The ends of an interval, with as many digits as tell them apart; nothing where they agree in all digits. */
function interval(lower, upper) {
  if (lower === null || lower === undefined || upper === null || upper === undefined) return '';
  for (let digits = DIGITS; digits <= INTERVAL_DIGITS; digits += 1) {
    if (shown(lower, digits) !== shown(upper, digits)) return `${shown(lower, digits)} … ${shown(upper, digits)}`;
  }
  return '';
}

/** A number with so many digits, as people write it and as sentences have it: 0.0123, 5.021, 12 300, 1.2×10⁻⁷. */
function shown(value, digits = DIGITS) {
  if (value === null || value === undefined) return '–';
  if (Number.isNaN(value)) return 'NaN';
  if (!Number.isFinite(value)) return value > 0 ? '∞' : '−∞';
  if (value === 0) return '0';
  const size = Number(Math.abs(value).toPrecision(digits));
  if (!isPlain(size)) return withPower(value, digits);
  return (value < 0 ? '−' : '') + (size >= 1e4 ? grouped(size) : String(size));
}

/** Ticks at round numbers, about so many. */
function roundTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k += 1) ticks.push(k * step);
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const size = Math.max(Math.abs(low), Math.abs(high));
  const plain = size < 1e6 && decimals <= 4;
  return ticks.map((value) => ({
    value,
    label: !plain ? shown(Math.abs(value) < step / 2 ? 0 : value, 3) : (value < -step / 2 ? '−' : '') + (size >= 1e4 ? grouped(Math.abs(Math.round(value))) : Math.abs(value).toFixed(decimals)),
  }));
}

/** Index of the entry nearest to x in ascending numbers; -1 where there are none. */
function nearest(sorted, x) {
  let low = 0;
  let high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - sorted[low - 1] < sorted[low] - x ? low - 1 : high < 0 ? -1 : low;
}

// --- Scales: from values to the share of the plot's height, and ticks ---------------------------------------------

function linearScale(low, high, height) {
  const span = high - low;
  return {place: (v) => (v - low) / span, ticks: roundTicks(low, high, Math.max(2, Math.round(height / 36)))};
}

function powersWithin(low, high, height) {
  const [first, last] = [Math.ceil(low - 1e-9), Math.floor(high + 1e-9)];
  const stride = Math.max(1, Math.ceil(((last - first) * 24) / height));
  const powers = [];
  for (let p = Math.ceil(first / stride) * stride; p <= last; p += stride) powers.push(p);
  return powers;
}

function logScale(low, high, height) {
  const [a, b] = [Math.log10(low), Math.log10(high)];
  const place = (v) => (Math.log10(v) - a) / (b - a);
  if (b - a < 1.5) {
    const ticks = [];
    for (let p = Math.floor(a); p <= Math.ceil(b); p += 1) {
      for (const factor of b - a < 1 ? [1, 1.5, 2, 3, 4, 5, 6, 8] : [1, 2, 5]) ticks.push(factor * 10 ** p);
    }
    return {place, ticks: labelled(ticks.filter((v) => v >= low && v <= high), 3)};
  }
  return {place, ticks: labelled(powersWithin(a, b, height).map((p) => 10 ** p), 2)};
}

/** Logarithmic on both sides of zero, linear within a ten-thousandth of the largest size or a tenth of the middle one. */
function symlogScale(low, high, height, middle) {
  const unit = Math.min(1e-4 * Math.max(Math.abs(low), Math.abs(high)), 0.1 * (middle || Infinity));
  const bend = (v) => Math.sign(v) * Math.log10(1 + Math.abs(v) / unit);
  const [a, b] = [bend(low), bend(high)];
  const start = Math.ceil(Math.log10(unit) + 0.7);
  const stride = Math.max(1, Math.ceil((24 * (bend(high) - bend(low))) / height));
  const ticks = [0];
  for (const [limit, sign] of [[high, 1], [-low, -1]]) {
    for (let p = start; 10 ** p <= limit; p += stride) ticks.push(sign * 10 ** p);
  }
  return {place: (v) => (bend(v) - a) / (b - a), ticks: labelled(ticks.filter((v) => v >= low && v <= high), 2)};
}

/** The scale from the lowest to the highest value, of which the sizes have a median. */
function scaleFor(low, high, middle, mode, height, spread = SPREAD) {
  const wide = low > 0 ? high / low > spread : Math.max(-low, high) > WIDE * middle;
  if (mode === 'log' || (mode === 'auto' && wide)) {
    if (low > 0) return logScale(low / 1.08, high * 1.08, height);
    const margin = 0.12 * Math.max(Math.abs(low), Math.abs(high));
    return symlogScale(low < 0 ? low - margin : low, high > 0 ? high + margin : high, height, middle);
  }
  const margin = high > low ? 0.06 * (high - low) : 0.1 * (Math.abs(high) || 1);
  return linearScale(low === 0 ? 0 : low - margin, high + margin, height);
}

// --- What is drawn: lines and heat maps from the data of the runs chosen -------------------------------------------

const known = (series, name) => series.values[name]?.some((value) => Number.isFinite(value));

/**
 * A line of a monitor's values, with its interval or error where there is one.
 *
 * Where a value is missing, a line that `breaks` has a gap. The others join the values that there are, as some are
 * measured now and then only.
 */
function line(series, name, label, style = {}) {
  const values = series.values[name];
  const error = series.values[`${name}_error`];
  const ends = (sign) => error && values.map((value, k) => (value === null || error[k] === null ? null : value + sign * error[k]));
  return {
    series,
    label,
    steps: series.steps,
    values,
    lower: series.values[`${name}_lower`] || ends(-1),
    upper: series.values[`${name}_upper`] || ends(1),
    isError: Boolean(error),
    ...style,
  };
}

/** A line of a scalar's points. */
const scalarLine = (series, tag, label, style = {}) => ({series, label, ...series.scalars[tag], ...style});

const later = (rank) => LATER[Math.min(rank, LATER.length - 1)];

const subscript = (text) => text.replace(/\d/g, (c) => '₀₁₂₃₄₅₆₇₈₉'[c]);

/** Whether the threshold of this series is that of the preconditioned eigenvalue. */
function isPreconditioned(series) {
  const {preconditioned_lambda_max: own, lambda_max: raw, stability_ratio: ratio, stability_threshold: threshold} = series.values;
  if (!own || !ratio || !threshold) return false;
  const k = ratio.findLastIndex((value, i) => value !== null && own[i] !== null && threshold[i] !== null);
  if (k < 0) return false;
  const largest = ratio[k] * threshold[k];
  return !raw || raw[k] === null || Math.abs(own[k] - largest) <= Math.abs(raw[k] - largest);
}

function eigenvalueLines(all) {
  const lines = [];
  for (const series of all.filter((s) => known(s, 'lambda_max'))) {
    lines.push(line(series, 'lambda_max', 'λ max', {main: true, breaks: true, certified: series.certified}));
    const others = Object.keys(series.values).filter((name) => /^lambda_\d+$/.test(name));
    others.sort((a, b) => Number(a.slice(7)) - Number(b.slice(7)));
    others.forEach((name, rank) => lines.push(line(series, name, `λ${subscript(name.slice(7))}`, {...later(rank), breaks: true})));
    if (known(series, 'stability_threshold') && !isPreconditioned(series)) lines.push(thresholdLine(series));
  }
  return lines;
}

const thresholdLine = (series) => line(series, 'stability_threshold', 'stability threshold', {dash: [7, 4], width: 1.5, threshold: true});

/** All charts that have data, from top to bottom. */
function chartsOf(all) {
  const charts = [];
  const add = (id, title, unit, lines, more = {}) => {
    const drawn = lines.filter((l) => l && l.steps?.length && finite(l.values).length);
    if (drawn.some((l) => !l.threshold)) charts.push({id, title, unit, lines: drawn, ...more});
  };
  const each = (name, label, style) => all.filter((s) => known(s, name)).map((s) => line(s, name, label, style));
  const main = {main: true};
  const unstable = all.filter((s) => known(s, 'stability_ratio'));

  const preconditioned = all.filter((s) => known(s, 'preconditioned_lambda_max'));
  const adapted = preconditioned.filter(isPreconditioned);
  const addPreconditioned = (size) => add(
    'preconditioned',
    'Largest preconditioned eigenvalue',
    '1 / learning rate',
    preconditioned.flatMap((s) => [line(s, 'preconditioned_lambda_max', 'preconditioned λ max', {...main}), isPreconditioned(s) && thresholdLine(s)]),
    {shades: adapted, ...size},
  );
  // The eigenvalue that the threshold is for comes first.
  if (adapted.length) addPreconditioned({wide: true, height: 300});
  add('eigenvalues', 'Largest eigenvalues', 'L / θ²', eigenvalueLines(all), {wide: true, height: 300, shades: unstable.filter((s) => !isPreconditioned(s)), marks: true, leading: true});
  add('loss', 'Training loss', '', lossLines(all), {wide: true, height: 160, spread: 8});
  add('ratio', 'Stability ratio', 'largest eigenvalue / threshold', each('stability_ratio', 'ratio', main), {level: 1, shades: unstable});
  if (!adapted.length) addPreconditioned({});
  const smallest = all.flatMap((s) => Object.keys(s.values).filter((name) => /^lambda_min_\d+$/.test(name)).map((name, rank) => line(s, name, `λ min ${subscript(name.slice(11))}`, {...later(rank), breaks: true})));
  add('smallest', 'Smallest eigenvalues', 'L / θ²', [...each('lambda_min', 'λ min', {main: true, breaks: true}).map((l) => ({...l, certified: l.series.certified})), ...smallest], {level: 0, marks: true});
  add('sharpness', 'Sharpness', 'L', each('sharpness', 'sharpness', main));
  // StepMarginMonitor writes at other steps than CurvatureMonitor, as scalars.
  const beside = (name, label) => all.flatMap((s) => tagsBeside(s, name).map((tag) => scalarLine(s, tag, label, main)));
  add('margin', 'Step margin', 'above 1 a step overshoots', beside('step_margin', 'step margin'), {level: 1});
  add('critical', 'Critical sharpness', '1 / learning rate', beside('critical_sharpness', 'critical sharpness'));
  add('gradient', 'Curvature along the gradient', 'L / θ²', each('gradient_curvature', 'g′Hg / g′g', main), {level: 0});
  add('alignment', 'Gradient along top eigenvectors', 'share of g′g', each('gradient_alignment', 'share', main), {range: [0, 1]});
  heatMaps(all, charts);
  const steps = (tag, label, style) => all.filter((s) => s.leads && s.scalars[tag]).map((s) => scalarLine(s, tag, label, style));
  for (const name of ['damping', 'radius', 'sigma']) add(name, name[0].toUpperCase() + name.slice(1), 'of Newton steps', steps(`newton/${name}`, name, main), {spread: 8});
  add('decrease', 'Actual over predicted decrease', 'of Newton steps', [...steps('newton/ratio', 'step taken', main), ...steps('newton/first_ratio', 'step proposed', {dash: [5, 3], width: 1.3})], {level: 1, limits: [-1, 3]});
  add('iterations', 'Solver iterations', 'of Newton steps', steps('newton/iterations', 'iterations', main));
  for (const name of otherNames(all)) add(`value ${name}`, capital(name), UNITS.get(name) || '', each(name, capital(name).toLowerCase(), main));
  add('products', 'Products of a measurement', '', each('products', 'products', main));
  add('seconds', 'Duration of a measurement', 's', each('seconds', 'seconds', main));
  return charts;
}

/** Tags of a scalar beside the measurements of a series: those of its prefix, and for a run's first one those of no monitor. */
function tagsBeside(series, name) {
  const prefixes = Object.keys(series.scalars).filter((tag) => tag.endsWith(`/${name}`)).map((tag) => tag.slice(0, -name.length - 1));
  return prefixes.filter((prefix) => prefix === series.prefix || (series.leads && !series.prefixes.includes(prefix))).map((prefix) => `${prefix}/${name}`);
}

const UNITS = new Map([['trace', 'L / θ²'], ['gauss_newton_trace', 'L / θ²']]);
const capital = (name) => (name[0].toUpperCase() + name.slice(1)).replaceAll('_', ' ');
const SHOWN = /^(lambda_(max|min|\d+|min_\d+)|(preconditioned_)?lambda_max|stability_(ratio|threshold)|sharpness|gradient_(curvature|alignment)|products|seconds|certified|converged)$/;

/** Names of values that have no chart of their own above. */
function otherNames(all) {
  const names = new Set(all.flatMap((s) => Object.keys(s.values)));
  const ends = (name) => /_(lower|upper|error)$/.test(name) && names.has(name.replace(/_(lower|upper|error)$/, ''));
  return [...names].filter((name) => name && !SHOWN.test(name) && !ends(name));
}

function lossLines(all) {
  const lines = [];
  for (const series of all.filter((s) => s.leads)) {
    // The loss of training first: its line is the full one.
    const tags = Object.keys(series.scalars).filter((tag) => /loss/i.test(tag) && !tag.startsWith('newton/'));
    tags.sort((a, b) => /val|test/i.test(a) - /val|test/i.test(b) || (a < b ? -1 : 1));
    tags.slice(0, 4).forEach((tag, k) => lines.push(scalarLine(series, tag, tag, {main: k === 0, dash: DASHES[k], width: k ? 1.2 : 1.8})));
  }
  return lines;
}

function heatMaps(all, charts) {
  const named = (title, series) => (all.length > 1 ? `${title}: ${series.label}` : title);
  for (const series of all.filter((s) => s.density)) {
    charts.push({id: `density ${series.id}`, title: named('Spectral density', series), unit: 'log₁₀(1 + eigenvalues in a bar)', density: series.density, series, lines: [], height: 230});
  }
  for (const series of all.filter((s) => s.layers)) {
    const rows = Math.min(series.layers.names.length, 60);
    charts.push({id: `layers ${series.id}`, title: named('Largest eigenvalue of each layer', series), unit: 'L / θ²', layers: series.layers, series, lines: [], height: Math.max(230, 60 + 13 * rows)});
  }
}

// --- One chart ----------------------------------------------------------------------------------------------------

class Chart {
  constructor(page, spec) {
    this.page = page;
    this.title = el('h3');
    this.unit = el('span', {className: 'quiet'});
    this.readout = el('div', {className: 'readout'});
    this.legend = el('div', {className: 'legend'});
    this.canvas = el('canvas');
    this.over = el('canvas');
    this.plot = el('div', {className: 'plot'}, this.canvas, this.over);
    this.figure = el('figure', {tabIndex: 0}, el('figcaption', {}, this.title, this.unit, this.readout), this.legend, this.plot);
    this.set(spec);
    this.listen();
  }

  set(spec) {
    this.spec = spec;
    this.title.textContent = spec.title;
    this.title.title = spec.title;
    this.unit.textContent = spec.unit;
    this.figure.className = spec.wide ? 'wide' : '';
    this.figure.dataset.chart = spec.id;
    this.figure.dataset.points = JSON.stringify(spec.lines.length ? spec.lines.map((l) => l.steps.length) : [(spec.density || spec.layers).steps.length]);
    this.figure.setAttribute('aria-label', `${spec.title}. Arrow keys move from measurement to measurement, plus and minus zoom, 0 shows all.`);
    this.plot.style.minHeight = `${spec.height || 210}px`;
    this.fillLegend();
  }

  fillLegend() {
    const {lines, marks, shades, density, layers} = this.spec;
    const entries = [];
    const seen = new Set();
    for (const l of lines) {
      if (!seen.has(l.label)) entries.push(legendEntry(l.label, l));
      seen.add(l.label);
    }
    if (marks && lines.some((l) => l.certified?.includes(true))) entries.push(legendEntry('certified', {symbol: 'filled'}));
    if (marks && lines.some((l) => l.certified?.includes(false))) entries.push(legendEntry('tracked', {symbol: 'hollow'}));
    if (lines.some((l) => l.lower && l.upper)) entries.push(legendEntry(lines.some((l) => l.isError) ? 'standard error' : 'interval', {symbol: 'band'}));
    if (shades?.some((s) => s.values.stability_ratio.some((r) => r > 1))) entries.push(legendEntry('ratio above 1', {symbol: this.page.chosen().length > 1 ? 'strip' : 'shade'}));
    if (density || layers) {
      const {low, high, log} = this.heatRange();
      entries.push(el('span', {}, shown(log ? 10 ** low : low, 3), el('i', {className: 'ramp'}), shown(log ? 10 ** high : high, 3)));
    }
    this.legend.replaceChildren(...(entries.length > 1 || density || layers ? entries : []));
    this.legend.hidden = !this.legend.childNodes.length;
  }

  heatRange() {
    if (this.spec.density) return {low: 0, high: this.spec.density.heights.reduce((most, bars) => Math.max(most, ...bars), 0), log: false};
    const values = finite(this.spec.layers.values.flat());
    const most = values.reduce((a, b) => Math.max(a, b), -Infinity);
    // Eigenvalues that are zero up to rounding get the lowest colour, and do not decide on the scale.
    const large = values.filter((v) => v > most / REACH.below);
    const log = most > 0 && 2 * large.length >= values.length;
    const sizes = log ? large.map(Math.log10) : values;
    const low = sizes.reduce((a, b) => Math.min(a, b), Infinity);
    const high = sizes.reduce((a, b) => Math.max(a, b), -Infinity);
    return {low, high: high > low ? high : low + 1, log};
  }

  // Geometry. `x` takes a step to pixels, `y` a value.
  layout() {
    const width = this.plot.clientWidth;
    const height = this.plot.clientHeight;
    if (!width) return false;
    const left = this.spec.layers ? Math.min(150, width / 3) : GUTTER.left;
    this.box = {left, top: GUTTER.top, width: width - left - GUTTER.right, height: height - GUTTER.top - GUTTER.bottom};
    const ratio = window.devicePixelRatio || 1;
    for (const canvas of [this.canvas, this.over]) {
      if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
        [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
        [canvas.style.width, canvas.style.height] = [`${width}px`, `${height}px`];
      }
    }
    const [first, last] = this.page.range();
    this.x = (step) => this.box.left + ((step - first) / (last - first)) * this.box.width;
    this.stepAt = (x) => first + ((x - this.box.left) / this.box.width) * (last - first);
    this.scale = this.yScale(first, last);
    this.y = (value) => this.box.top + (1 - this.scale.place(value)) * this.box.height;
    return true;
  }

  yScale(first, last) {
    const {lines, range, level, limits, density, layers} = this.spec;
    if (layers) return {place: (v) => v, ticks: []};
    const leading = this.spec.leading && leadingRange(lines, first, last);
    const scale = this.page.state.scale;
    const led = leading && leading.low > 0 && (scale === 'log' || (scale === 'auto' && leading.high > SPREAD * leading.low));
    const mode = led ? 'log' : scale;
    let [low, high] = [Infinity, -Infinity];
    const take = (v) => {
      if (Number.isFinite(v) && !(led && v < leading.low / DEPTH)) [low, high] = [Math.min(low, v), Math.max(high, v)];
    };
    const [values, sizes] = [[], []];
    const enter = (step, found, size) => {
      if (step < first || step > last) return;
      values.push(...finite(found));
      if (Number.isFinite(size) && size > 0) sizes.push(size);
    };
    density?.steps.forEach((step, k) => {
      const ends = [density.edges[k][0], density.edges[k].at(-1)];
      enter(step, ends, Math.max(...ends.map(Math.abs)));
    });
    for (const l of lines.filter((entry) => !entry.threshold)) l.steps.forEach((step, k) => l.values[k] !== null && enter(step, [l.values[k]], Math.abs(l.values[k])));
    const middle = median(sizes);
    const bothSigns = values.some((v) => v <= 0);
    const isNear = (v) => mode === 'linear' || !sizes.length || (Math.abs(v) <= REACH.above * middle && (bothSigns || v >= middle / REACH.below));
    values.filter(isNear).forEach(take);
    if (!(low <= high)) [low, high] = [0, 1];
    if (limits && scale === 'auto') {
      low = Math.max(low, limits[0]);
      high = Math.max(low, Math.min(high, limits[1]));
    }
    const positive = low > 0;
    // Intervals may be many times wider than the curve, and a threshold may lie far above it; neither may flatten it.
    const span = Math.max(high - low, 0.02 * Math.max(Math.abs(low), Math.abs(high)));
    const [least, most] = [positive ? Math.max(low - span, low / 3) : low - span, high + span];
    for (const l of lines) {
      l.steps.forEach((step, k) => {
        if (step < first || step > last) return;
        if (l.lower?.[k] !== null && l.lower) take(Math.max(least, l.lower[k]));
        if (l.upper?.[k] !== null && l.upper) take(Math.min(most, l.upper[k]));
        if (l.threshold && l.values[k] !== null && isNear(l.values[k]) && (mode === 'log' || l.values[k] < 4 * most)) take(l.values[k]);
      });
    }
    if (level !== undefined && mode !== 'log') take(level);
    if (range && mode !== 'log') range.forEach(take);
    return scaleFor(low, high, middle, mode, this.box.height, density ? Infinity : this.spec.spread);
  }

  draw() {
    if (!this.layout()) return;
    const c = this.pen(this.canvas);
    const theme = this.page.theme;
    this.axes(c, theme);
    c.save();
    c.beginPath();
    c.rect(this.box.left, this.box.top, this.box.width, this.box.height);
    c.clip();
    this.shade(c, theme);
    if (this.spec.density) this.paintDensity(c, theme);
    if (this.spec.layers) this.paintLayers(c, theme);
    if (this.spec.level !== undefined) this.paintLevel(c, theme);
    for (const l of this.spec.lines) this.paintBand(c, theme, l);
    for (const l of this.spec.lines.filter((entry) => !entry.main)) this.paintLine(c, theme, l);
    for (const l of this.spec.lines.filter((entry) => entry.main)) this.paintLine(c, theme, l);
    c.restore();
    for (const l of this.spec.lines.filter((entry) => entry.main)) this.paintMarks(c, theme, l);
    this.noteHiddenThreshold(c, theme);
    this.markBeyond(c, theme);
    this.drawCursor();
  }

  pen(canvas) {
    const c = canvas.getContext('2d');
    const ratio = window.devicePixelRatio || 1;
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.clearRect(0, 0, canvas.width, canvas.height);
    c.font = '11.5px Roboto, system-ui, sans-serif';
    c.lineJoin = 'round';
    return c;
  }

  axes(c, theme) {
    const {left, top, width, height} = this.box;
    c.textBaseline = 'middle';
    c.textAlign = 'right';
    let above = Infinity;
    for (const tick of [...this.scale.ticks].sort((a, b) => a.value - b.value)) {
      const y = this.y(tick.value);
      if (y < top - 1 || y > top + height + 1) continue;
      stroke(c, theme.grid, 1, [], [[left, Math.round(y) + 0.5], [left + width, Math.round(y) + 0.5]]);
      if (above - y < 15) continue;
      above = y;
      c.fillStyle = theme.muted;
      c.fillText(tick.label, left - 7, y);
    }
    c.textBaseline = 'top';
    c.textAlign = 'center';
    c.fillStyle = theme.muted;
    const [first, last] = this.page.range();
    const word = left + width - c.measureText('step').width;
    for (const tick of roundTicks(first, last, Math.max(2, Math.round(width / 90)))) {
      if (!Number.isInteger(tick.value) && last - first > 4) continue;
      const x = this.x(tick.value);
      stroke(c, theme.grid, 1, [], [[Math.round(x) + 0.5, top], [Math.round(x) + 0.5, top + height]]);
      const half = c.measureText(tick.label).width / 2;
      if (x + half < word - 8) c.fillText(tick.label, x, top + height + 7);
    }
    c.textAlign = 'right';
    c.fillText('step', left + width, top + height + 7);
    stroke(c, theme.line, 1, [], [[left, top + height + 0.5], [left + width, top + height + 0.5]]);
  }

  /** Where the ratio exceeds one: the whole height for one run, a strip each for several. */
  shade(c, theme) {
    const shades = (this.spec.shades || []).filter((series) => exceeding(series).length);
    const strips = this.page.chosen().length > 1;
    shades.forEach((series, k) => {
      c.fillStyle = strips ? theme.run[series.colour] : theme.shade;
      c.globalAlpha = strips ? 0.75 : 1;
      for (const [from, to] of exceeding(series)) {
        const [a, b] = [this.x(from), this.x(to)];
        if (strips) c.fillRect(a, this.box.top + 4 * k, Math.max(1, b - a), 3);
        else c.fillRect(a, this.box.top, Math.max(1, b - a), this.box.height);
      }
      c.globalAlpha = 1;
    });
  }

  paintLevel(c, theme) {
    const y = Math.round(this.y(this.spec.level)) + 0.5;
    stroke(c, theme.muted, 1, [4, 3], [[this.box.left, y], [this.box.left + this.box.width, y]]);
  }

  paintBand(c, theme, l) {
    if (!l.lower || !l.upper) return;
    const up = this.path(l.steps, l.upper, {whole: true});
    const down = this.path(l.steps, l.lower, {whole: true});
    const colour = theme.run[l.series.colour];
    c.fillStyle = colour;
    c.globalAlpha = 0.16;
    c.beginPath();
    for (const [x, y] of [...up, ...down.reverse()]) c.lineTo(x, y);
    c.fill();
    c.globalAlpha = 0.4;
    stroke(c, colour, 0.75, [], up);
    stroke(c, colour, 0.75, [], down);
    c.globalAlpha = 1;
  }

  paintLine(c, theme, l) {
    c.globalAlpha = l.alpha ?? 1;
    const colour = theme.run[l.series.colour];
    const dash = l.dash || [];
    let points = [];
    for (const point of [...this.path(l.steps, l.values, {breaks: l.breaks}), null]) {
      if (point) points.push(point);
      if (point || !points.length) continue;
      if (points.length === 1) {
        c.fillStyle = colour;
        disc(c, points[0][0], points[0][1], 1 + (l.width ?? 2) / 2);
        c.fill();
      } else stroke(c, colour, points.length > this.box.width ? Math.min(1, l.width ?? 1) : l.width ?? 2, dash, points);
      points = [];
    }
    c.globalAlpha = 1;
  }

  /** Points in pixels, `null` between pieces; many points in one column of pixels become the extremes among them. */
  path(steps, values, {whole = false, breaks = false}) {
    const points = [];
    const [first, last] = this.visible(steps);
    let column = null;
    let held = [];
    const flush = () => {
      if (held.length <= 4) points.push(...held);
      else {
        const low = held.reduce((a, b) => (b[1] > a[1] ? b : a));
        const high = held.reduce((a, b) => (b[1] < a[1] ? b : a));
        points.push(held[0], ...(held.indexOf(low) < held.indexOf(high) ? [low, high] : [high, low]), held.at(-1));
      }
      held = [];
    };
    for (let k = first; k <= last; k += 1) {
      if (values[k] === null && !breaks) continue; // not measured this time
      const [x, y] = [this.x(steps[k]), values[k] === null ? NaN : this.y(values[k])];
      if (!Number.isFinite(y)) {
        if (whole) continue;
        flush();
        points.push(null);
        column = null;
        continue;
      }
      if (Math.floor(x) !== column) flush();
      column = Math.floor(x);
      held.push([x, Math.max(-1e4, Math.min(1e4, y))]);
    }
    flush();
    return points;
  }

  /** Indices of the first and the last step in view, with one more at each side so that lines reach the edges. */
  visible(steps) {
    const [first, last] = this.page.range();
    let [low, high] = [0, steps.length - 1];
    while (low < high && steps[low + 1] < first) low += 1;
    while (high > low && steps[high - 1] > last) high -= 1;
    return [low, high];
  }

  /** Filled markers for certified values, hollow ones for tracked ones, as many as there is room for. */
  paintMarks(c, theme, l) {
    const [first, last] = this.visible(l.steps);
    const {left, top, width, height} = this.box;
    const inside = [];
    for (let k = first; k <= last; k += 1) {
      const [x, y] = [this.x(l.steps[k]), l.values[k] === null ? NaN : this.y(l.values[k])];
      if (Number.isFinite(y) && x >= left - 1 && x <= left + width + 1 && y >= top - 4 && y <= top + height + 4) inside.push([x, y, k]);
    }
    if (!l.certified && (inside.length > 1 && width / inside.length < 18)) return;
    const colour = theme.run[l.series.colour];
    const taken = new Set();
    const free = (x) => ![-1, 0, 1].some((d) => taken.has(Math.round(x / 5) + d));
    for (const [filled, radius] of l.certified ? [[true, 3.4], [false, 2.6]] : [[null, 2.2]]) {
      for (const [x, y, k] of inside) {
        if ((l.certified && Boolean(l.certified[k]) !== filled) || (l.certified && !free(x))) continue;
        taken.add(Math.round(x / 5));
        disc(c, x, y, radius);
        c.fillStyle = filled === false ? theme.card : colour;
        c.fill();
        if (filled === false) {
          c.strokeStyle = colour;
          c.lineWidth = 1.4;
          c.setLineDash([]);
          c.stroke();
        }
      }
    }
  }

  /** Say where a threshold is that lies above what is shown. */
  noteHiddenThreshold(c, theme) {
    const hidden = this.spec.lines.filter((l) => l.threshold && finite(l.values).length && finite(l.values).every((v) => this.y(v) < this.box.top - 1));
    hidden.forEach((l, k) => {
      const text = `↑ threshold ${shown(finite(l.values).at(-1), 3)}`;
      const [right, y] = [this.box.left + this.box.width - 4, this.box.top + 3 + 16 * k];
      const wide = c.measureText(text).width;
      c.fillStyle = theme.card;
      c.fillRect(right - wide - 4, y - 2, wide + 8, 16);
      c.fillStyle = theme.run[l.series.colour];
      c.textAlign = 'right';
      c.textBaseline = 'top';
      c.fillText(text, right, y);
    });
  }

  /** Mark with arrows at the edge of the plot what lies beyond it, and say how far it goes. */
  markBeyond(c, theme) {
    const {left, top, height} = this.box;
    const [first, last] = this.page.range();
    for (const [sign, edge, word] of [[1, top, '▲ up to'], [-1, top + height, '▼ down to']]) {
      const beyond = [];
      for (const l of this.spec.lines.filter((entry) => entry.main)) {
        let free = -Infinity;
        l.steps.forEach((step, k) => {
          if (l.values[k] === null || Number.isNaN(l.values[k]) || step < first || step > last) return;
          const y = this.y(l.values[k]);
          if (sign > 0 ? !(y < top - 2) : !(y > top + height + 2 || Number.isNaN(y))) return;
          beyond.push(l.values[k]);
          const x = this.x(step);
          if (x < free) return;
          free = x + 9;
          c.fillStyle = theme.run[l.series.colour];
          c.beginPath();
          c.moveTo(x, edge - sign);
          c.lineTo(x - 4, edge + 6 * sign);
          c.lineTo(x + 4, edge + 6 * sign);
          c.fill();
        });
      }
      if (!beyond.length) continue;
      const farthest = beyond.reduce((a, b) => (sign * b > sign * a ? b : a));
      const text = `${word} ${shown(farthest, 2)}`;
      const wide = c.measureText(text).width;
      const y = sign > 0 ? top + 9 : top + height - 25;
      c.fillStyle = theme.card;
      c.fillRect(left + 4, y, wide + 8, 16);
      c.fillStyle = theme.muted;
      c.textAlign = 'left';
      c.textBaseline = 'top';
      c.fillText(text, left + 8, y + 2);
    }
  }

  paintDensity(c, theme) {
    const {steps, edges, heights} = this.spec.density;
    const most = this.heatRange().high || 1;
    steps.forEach((step, k) => {
      const [from, to] = this.column(steps, k);
      heights[k].forEach((height, bar) => {
        if (height <= 0) return;
        const [low, high] = [this.y(edges[k][bar]), this.y(edges[k][bar + 1])];
        c.fillStyle = theme.heat(height / most);
        c.fillRect(from, high - 0.4, to - from + 0.6, Math.max(1, low - high + 0.8));
      });
    });
  }

  paintLayers(c, theme) {
    const {steps, names, values} = this.spec.layers;
    const {low, high, log} = this.heatRange();
    const row = this.box.height / names.length;
    steps.forEach((step, k) => {
      const [from, to] = this.column(steps, k);
      values[k].forEach((value, n) => {
        if (!Number.isFinite(value)) return;
        c.fillStyle = theme.heat(((log ? Math.log10(Math.max(value, 1e-300)) : value) - low) / (high - low));
        c.fillRect(from, this.box.top + n * row, to - from + 0.6, row - (row > 6 ? 1 : 0));
      });
    });
    c.restore();
    c.save();
    c.textAlign = 'right';
    c.textBaseline = 'middle';
    c.fillStyle = theme.muted;
    const stride = Math.ceil(13 / row);
    names.forEach((name, n) => n % stride === 0 && c.fillText(shortened(c, name, this.box.left - 12), this.box.left - 7, this.box.top + (n + 0.5) * row));
  }

  /** Left and right end of a column of a heat map: halfway to its neighbours. */
  column(steps, k) {
    const gap = steps.length > 1 ? (steps.at(-1) - steps[0]) / (steps.length - 1) : 1;
    const from = k > 0 ? (steps[k - 1] + steps[k]) / 2 : steps[k] - gap / 2;
    const to = k < steps.length - 1 ? (steps[k] + steps[k + 1]) / 2 : steps[k] + gap / 2;
    return [this.x(from), this.x(to)];
  }

  // The crosshair, the dots on it, and what is selected for zooming, on a canvas of their own.
  drawCursor() {
    if (!this.x) return;
    const c = this.pen(this.over);
    const {left, top, width, height} = this.box;
    const {theme, cursor} = this.page;
    if (this.drag) {
      const [a, b] = this.drag.map((x) => Math.max(left, Math.min(left + width, x)));
      c.fillStyle = theme.accent;
      c.globalAlpha = 0.15;
      c.fillRect(Math.min(a, b), top, Math.abs(b - a), height);
      c.globalAlpha = 1;
    }
    if (cursor !== null) {
      const x = this.x(cursor);
      if (x >= left - 1 && x <= left + width + 1) {
        stroke(c, theme.muted, 1, [], [[Math.round(x) + 0.5, top], [Math.round(x) + 0.5, top + height]]);
        for (const {l, k} of this.at(cursor)) {
          const y = this.y(l.values[k]);
          if (!(y >= top - 3 && y <= top + height + 3)) continue;
          disc(c, this.x(l.steps[k]), y, l.main ? 4 : 3);
          c.fillStyle = theme.run[l.series.colour];
          c.fill();
          c.strokeStyle = theme.card;
          c.lineWidth = 1.5;
          c.stroke();
        }
      }
    }
    this.fillReadout();
  }

  /** For each line the index of its value next to a step, if it is near enough to speak of one step. */
  at(step) {
    const found = [];
    const tolerance = Math.abs(this.stepAt(NEAR) - this.stepAt(0));
    for (const l of this.spec.lines) {
      let k = nearest(l.steps, step);
      while (k > 0 && l.values[k] === null && step - l.steps[k - 1] <= tolerance) k -= 1;
      if (k >= 0 && l.values[k] !== null && Math.abs(l.steps[k] - step) <= tolerance) found.push({l, k});
    }
    return found;
  }

  fillReadout() {
    const {cursor} = this.page;
    const main = cursor === null ? this.spec.lines.map((l) => ({l, k: l.values.findLastIndex((v) => v !== null)})).filter(({k}) => k >= 0) : this.at(cursor);
    const found = main.filter(({l}) => l.main);
    const entries = found.slice(0, MOST_READ).map(({l, k}) => {
      const old = cursor === null && k < l.steps.length - 1;
      const entry = el('span', {title: l.series.label}, shown(l.values[k], 3), old ? el('small', {}, ` step ${grouped(l.steps[k])}`) : '');
      entry.style.setProperty('--swatch', this.page.theme.run[l.series.colour]);
      return entry;
    });
    if (found.length > entries.length) entries.push(el('small', {}, `and ${found.length - entries.length} more`));
    this.readout.replaceChildren(...entries);
  }

  /** Rows of the box beside the pointer: label, value, remark, colour. */
  rows(step, y) {
    const several = new Set(this.spec.lines.map((l) => l.series.id)).size > 1;
    const at = this.at(step);
    // For several runs a row each: the main value, its neighbours, and the threshold that it is compared with.
    const rows = at.filter(({l}) => !several || l.main).map(({l, k}) => {
      const others = several ? at.filter((other) => other.l !== l && other.l.series === l.series) : [];
      const limit = others.find((other) => other.l.threshold);
      const further = others.filter((other) => !other.l.threshold).slice(0, MOST_BESIDE).map((other) => `${other.l.label} ${shown(other.l.values[other.k], 3)}`);
      const within = several ? '' : interval(l.lower?.[k], l.upper?.[k]);
      const kind = l.certified ? {true: 'certified', false: 'tracked'}[l.certified[k]] || '' : '';
      const remarks = [...further, limit ? `threshold ${shown(limit.l.values[limit.k], 3)}` : '', within, several ? '' : kind];
      return [several ? l.series.label : l.label, shown(l.values[k], 5), remarks.filter(Boolean).join(', '), l.series.colour];
    });
    const {density, layers, series} = this.spec;
    if (density) {
      const k = nearest(density.steps, step);
      const bar = density.heights[k].findIndex((_, b) => this.y(density.edges[k][b]) >= y && y >= this.y(density.edges[k][b + 1]));
      if (bar >= 0) rows.push([`${shown(density.edges[k][bar], 3)} … ${shown(density.edges[k][bar + 1], 3)}`, shown(Math.max(0, 10 ** density.heights[k][bar] - 1), 3), 'eigenvalues', series.colour]);
    }
    if (layers) {
      const k = nearest(layers.steps, step);
      const n = Math.floor(((y - this.box.top) / this.box.height) * layers.names.length);
      if (n >= 0 && n < layers.names.length) rows.push([layers.names[n], shown(layers.values[k][n], 4), '', series.colour]);
    }
    return rows;
  }

  listen() {
    const {plot, figure, page} = this;
    const place = (event) => {
      const box = plot.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    plot.addEventListener('pointermove', (event) => {
      if (!this.box) return;
      const [x, y] = place(event);
      if (this.drag) this.drag[1] = x;
      page.point(this, this.stepAt(x), y, event.clientX, event.clientY);
    });
    plot.addEventListener('pointerleave', () => !this.drag && page.point(null));
    plot.addEventListener('pointerdown', (event) => {
      if (event.button !== 0 || !this.box) return;
      plot.setPointerCapture(event.pointerId);
      this.drag = [place(event)[0], place(event)[0]];
    });
    plot.addEventListener('pointerup', () => {
      const drag = this.drag;
      this.drag = null;
      if (drag && Math.abs(drag[1] - drag[0]) > 6) page.zoom(...drag.map((x) => this.stepAt(x)).sort((a, b) => a - b));
      else page.drawCursors();
    });
    plot.addEventListener('pointercancel', () => {
      this.drag = null;
      page.point(null);
    });
    plot.addEventListener('dblclick', () => page.zoom());
    figure.addEventListener('blur', () => page.point(null));
    figure.addEventListener('keydown', (event) => {
      const moves = {ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity};
      if (event.key in moves) page.move(this, moves[event.key] * (event.shiftKey ? 10 : 1));
      else if (event.key === '+' || event.key === '=') page.zoomBy(0.5);
      else if (event.key === '-') page.zoomBy(2);
      else if (event.key === '0') page.zoom();
      else if (event.key === 'Escape') page.point(null);
      else return;
      event.preventDefault();
    });
  }
}

function stroke(c, colour, width, dash, points) {
  c.strokeStyle = colour;
  c.lineWidth = width;
  c.setLineDash(dash);
  c.beginPath();
  for (const [x, y] of points) c.lineTo(x, y);
  c.stroke();
}

function disc(c, x, y, radius) {
  c.beginPath();
  c.arc(x, y, radius, 0, 2 * Math.PI);
}

function shortened(c, text, width) {
  if (c.measureText(text).width <= width) return text;
  let kept = text;
  while (kept.length > 1 && c.measureText(`…${kept}`).width > width) kept = kept.slice(1);
  return `…${kept}`;
}

/** Lowest and highest value of the main lines in view. */
function leadingRange(lines, first, last) {
  const values = lines.filter((l) => l.main).flatMap((l) => l.values.filter((value, k) => Number.isFinite(value) && l.steps[k] >= first && l.steps[k] <= last));
  return {low: values.reduce((a, b) => Math.min(a, b), Infinity), high: values.reduce((a, b) => Math.max(a, b), -Infinity)};
}

/** Intervals of steps where the ratio exceeds one, with crossings between measurements on the line between them. */
function exceeding(series) {
  const found = [];
  let before = null;
  series.steps.forEach((step, k) => {
    const ratio = series.values.stability_ratio[k];
    if (ratio === null || !Number.isFinite(ratio)) return;
    const crossing = before && step - ((step - before.step) * (ratio - 1)) / (ratio - before.ratio);
    if (before && before.ratio > 1) found.push([before.step, ratio > 1 ? step : crossing]);
    else if (before && ratio > 1) found.push([crossing, step]);
    else if (ratio > 1) found.push([step, step]);
    before = {step, ratio};
  });
  return found.reduce((joined, [from, to]) => {
    if (joined.length && joined.at(-1)[1] >= from) joined.at(-1)[1] = Math.max(to, joined.at(-1)[1]);
    else joined.push([from, to]);
    return joined;
  }, []);
}

function legendEntry(text, {symbol, width = 2, dash = [], alpha = 1}) {
  const canvas = el('canvas', {width: 44, height: 24});
  canvas.style.width = '22px';
  canvas.style.height = '12px';
  const c = canvas.getContext('2d');
  const theme = themeOf();
  c.scale(2, 2);
  if (symbol === 'filled' || symbol === 'hollow') {
    disc(c, 11, 6, 3.2);
    c.fillStyle = c.strokeStyle = theme.text;
    c.lineWidth = 1.4;
    if (symbol === 'filled') c.fill();
    else c.stroke();
  } else if (symbol === 'strip') {
    c.fillStyle = theme.text;
    c.fillRect(2, 2, 18, 3);
  } else if (symbol) {
    c.fillStyle = symbol === 'shade' ? theme.shade : theme.text;
    c.globalAlpha = symbol === 'shade' ? 1 : 0.2;
    c.fillRect(2, 1, 18, 10);
    if (symbol === 'shade') c.fillRect(2, 1, 18, 10);
  } else {
    c.globalAlpha = alpha;
    stroke(c, theme.text, width, dash.map((d) => d * 0.8), [[1, 6], [21, 6]]);
  }
  return el('span', {}, canvas, text);
}

function themeOf() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(`--${name}`).trim();
  const stops = [0, 1, 2, 3, 4].map((k) => read(`heat-${k}`).match(/[\da-f]{2}/gi).map((part) => parseInt(part, 16)));
  const heat = (share) => {
    const at = Math.max(0, Math.min(1, share || 0)) * (stops.length - 1);
    const k = Math.min(stops.length - 2, Math.floor(at));
    return `rgb(${stops[k].map((part, i) => Math.round(part + (at - k) * (stops[k + 1][i] - part))).join(',')})`;
  };
  const names = ['text', 'muted', 'grid', 'line', 'card', 'accent', 'shade'];
  return {...Object.fromEntries(names.map((name) => [name, read(name)])), run: Array.from({length: COLOURS}, (_, k) => read(`run-${k}`)), heat};
}

// --- The page -----------------------------------------------------------------------------------------------------

class Page {
  constructor() {
    this.state = {runs: null, scale: 'auto', zoom: null, ...readAddress()};
    this.all = []; // every series, chosen or not
    this.data = new Map(); // answers by run
    this.marks = new Map(); // ETags by address
    this.colours = new Map();
    this.charts = new Map();
    this.cursor = null;
    this.theme = themeOf();
    this.build();
    this.follow();
  }

  build() {
    this.list = el('ul', {className: 'runs', 'aria-label': 'Runs'});
    this.search = el('input', {type: 'search', placeholder: 'Filter runs', 'aria-label': 'Filter runs'});
    this.search.addEventListener('input', () => this.fillList());
    const every = el('button', {className: 'link', type: 'button', textContent: 'All'});
    const none = el('button', {className: 'link', type: 'button', textContent: 'None'});
    every.addEventListener('click', () => this.choose(this.matching().map((s) => s.id)));
    none.addEventListener('click', () => this.choose([]));
    this.scales = ['auto', 'linear', 'log'].map((scale) => {
      const button = el('button', {type: 'button', textContent: scale[0].toUpperCase() + scale.slice(1)});
      button.title = {auto: 'Logarithmic where values span more than two decades, or the largest is a thousand times the median', linear: 'Linear', log: 'Logarithmic, on both sides of zero where signs differ'}[scale];
      button.addEventListener('click', () => {
        this.state.scale = scale;
        this.changed();
      });
      return button;
    });
    this.reset = el('button', {type: 'button', textContent: 'Show all steps'});
    this.reset.addEventListener('click', () => this.zoom());
    this.updated = el('div', {className: 'quiet'});
    this.cards = el('section', {className: 'cards', 'aria-label': 'Last measurements in words'});
    this.notes = el('section', {className: 'group'});
    this.grid = el('section', {className: 'charts', 'aria-label': 'Charts'});
    this.tip = el('div', {className: 'tip', hidden: true});
    this.heard = el('div', {className: 'heard', 'aria-live': 'polite'});
    this.aside = el(
      'aside',
      {},
      el('div', {className: 'group'}, el('div', {className: 'row'}, el('h2', {}, 'Runs'), el('span', {}, every, none)), this.search, this.list),
      el('div', {className: 'group controls'}, el('h2', {}, 'Scale'), el('div', {className: 'choice', role: 'group', 'aria-label': 'Scale'}, ...this.scales), this.reset),
      el('div', {className: 'quiet help'}, 'Drag to zoom, double-click to show all. In a chart the arrow keys move from measurement to measurement.'),
      this.updated,
    );
    this.main = el('main', {}, this.notes, this.cards, this.grid);
    this.page = el('div', {className: 'page', hidden: true}, this.aside, this.main);
    this.empty = emptyPage();
    document.body.append(this.page, this.empty, this.tip, this.heard);
    new ResizeObserver(() => this.later()).observe(document.body);
  }

  /** Follow TensorBoard's theme and its reload button, and ask for news now and then. */
  follow() {
    const host = hostDocument();
    const theme = () => {
      const dark = host ? host.body.classList.contains('dark-mode') : matchMedia('(prefers-color-scheme: dark)').matches;
      document.documentElement.classList.toggle('dark', dark);
      this.theme = themeOf();
      for (const chart of this.charts.values()) chart.fillLegend();
      this.fillList();
      this.fillCards();
      this.later();
    };
    theme();
    if (host) new MutationObserver(theme).observe(host.body, {attributes: true, attributeFilter: ['class']});
    if (window.parent !== window) {
      const {port1, port2} = new MessageChannel();
      port1.addEventListener('message', (event) => {
        const message = JSON.parse(event.data);
        if (message.isReply) return;
        if (message.type === 'experimental.DataReloaded') this.refresh();
        port1.postMessage(JSON.stringify({type: message.type, id: message.id, payload: null, error: null, isReply: true}));
      });
      port1.start();
      window.parent.postMessage('experimental.bootstrap', window.location.origin, [port2]);
    }
    const again = async () => {
      const began = performance.now();
      // A page that nobody sees asks nothing: TensorBoard hides the frames of the tabs that are not open.
      if (!document.hidden && window.innerWidth > 0) await this.refresh();
      // Much data take long to read; what reading takes from training stays small.
      setTimeout(again, Math.max(POLL, 20 * (performance.now() - began)));
    };
    again();
  }

  refresh() {
    this.pending = (this.pending || Promise.resolve()).then(() => this.load()).catch((error) => this.say([`TensorBoard does not answer: ${error.message || error}.`]));
    return this.pending;
  }

  async load() {
    const listed = await this.ask('runs');
    if (listed?.error) {
      this.say([listed.error]);
      return;
    }
    if (listed) this.runs = listed.runs;
    this.arrange();
    const wanted = [...new Set(this.chosen().map((s) => s.run))];
    let news = Boolean(listed);
    for (let k = 0; k < wanted.length; k += RUNS_IN_A_REQUEST) {
      const query = wanted.slice(k, k + RUNS_IN_A_REQUEST).map((run) => `run=${encodeURIComponent(run)}`).join('&');
      const answer = await this.ask(`data?${query}`);
      if (answer?.error) {
        this.say([answer.error]);
        return;
      }
      for (const [run, found] of Object.entries(answer?.runs || {})) this.data.set(run, found);
      news ||= Boolean(answer);
    }
    if (news) {
      this.arrange();
      this.show();
      this.updated.textContent = `Updated ${new Date().toLocaleTimeString()}`;
    }
  }

  /** An answer in JSON, or null where nothing has changed. */
  async ask(path) {
    const headers = this.marks.has(path) ? {'If-None-Match': this.marks.get(path)} : {};
    const response = await fetch(`./${path}`, {headers, cache: 'no-store'});
    if (response.status === 304) return null;
    if (!response.ok) throw new Error(`status ${response.status}`);
    const answer = await response.json();
    if (response.headers.has('ETag')) this.marks.set(path, response.headers.get('ETag'));
    return answer;
  }

  /** Make a series of each monitor in each run. */
  arrange() {
    this.all = [];
    for (const {run, prefixes} of this.runs || []) {
      const data = this.data.get(run);
      (prefixes.length ? prefixes : [null]).forEach((prefix, k) => {
        const measured = prefix !== null && Object.hasOwn(data?.monitors || {}, prefix);
        const monitor = measured ? data.monitors[prefix] : {steps: [], values: {}, certified: [], words: [], state: null, remark: ''};
        const label = prefix === null || prefix === 'curvature' ? run : `${run} · ${prefix}`;
        const values = table(Object.entries(monitor.values).map(([name, column]) => [name, column.map(number)]));
        const layers = monitor.layers && {...monitor.layers, values: monitor.layers.values.map((row) => row.map(number))};
        const scalars = table(Object.entries(data?.scalars || {}).map(([tag, s]) => [tag, {steps: s.steps, values: s.values.map(number)}]));
        this.all.push({...monitor, prefix, prefixes, id: prefix === null ? run : `${run}\u001f${prefix}`, run, label, values, layers, scalars, leads: k === 0, errors: data?.errors || []});
      });
    }
    const chosen = new Set(this.state.runs || this.all.slice(0, MOST_CHOSEN).map((s) => s.id));
    for (const series of this.all) series.chosen = chosen.has(series.id);
    for (const id of [...this.colours.keys()]) if (!chosen.has(id)) this.colours.delete(id);
    for (const series of this.chosen()) {
      if (!this.colours.has(series.id)) this.colours.set(series.id, freeColour(hashOf(series.label), [...this.colours.values()]));
      series.colour = this.colours.get(series.id);
    }
  }

  chosen() {
    return this.all.filter((s) => s.chosen);
  }

  matching() {
    const wanted = this.search.value.toLowerCase();
    return this.all.filter((s) => s.label.toLowerCase().includes(wanted));
  }

  choose(ids) {
    this.state.runs = ids;
    writeAddress(this.state);
    this.arrange();
    this.show();
    this.refresh();
  }

  changed() {
    writeAddress(this.state);
    this.fillControls();
    this.later();
  }

  show() {
    this.empty.hidden = this.all.length > 0;
    this.page.hidden = this.all.length === 0;
    this.fillList();
    this.fillControls();
    this.fillCards();
    this.say([]);
    const specs = chartsOf(this.chosen());
    for (const [id, chart] of this.charts) {
      if (specs.some((spec) => spec.id === id)) continue;
      chart.figure.remove();
      this.charts.delete(id);
    }
    specs.forEach((spec, k) => {
      if (this.charts.has(spec.id)) this.charts.get(spec.id).set(spec);
      else this.charts.set(spec.id, new Chart(this, spec));
      const {figure} = this.charts.get(spec.id);
      if (this.grid.children[k] !== figure) this.grid.insertBefore(figure, this.grid.children[k] || null);
    });
    this.later();
  }

  /** Draw all charts before the next frame. */
  later() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      const began = performance.now();
      for (const chart of this.charts.values()) chart.draw();
      if (this.charts.size) document.documentElement.dataset.drawn = (performance.now() - began).toFixed(1);
    });
  }

  fillList() {
    const focused = document.activeElement?.value;
    const items = this.matching().map((series) => {
      const box = el('input', {type: 'checkbox', checked: series.chosen, value: series.id});
      const item = el('label', {title: series.label}, box, el('span', {}, series.label));
      if (series.chosen) item.style.setProperty('--swatch', this.theme.run[series.colour]);
      box.addEventListener('change', () => {
        const ids = new Set(this.chosen().map((s) => s.id));
        if (box.checked) ids.add(series.id);
        else ids.delete(series.id);
        this.choose([...ids]);
      });
      return el('li', {}, item);
    });
    this.list.replaceChildren(...items);
    if (focused) [...this.list.querySelectorAll('input')].find((box) => box.value === focused)?.focus();
  }

  fillControls() {
    this.scales.forEach((button) => button.setAttribute('aria-pressed', String(button.textContent.toLowerCase() === this.state.scale)));
    this.reset.disabled = !this.state.zoom;
  }

  fillCards() {
    const open = new Set([...this.cards.querySelectorAll('details[open]')].map((details) => details.dataset.id));
    const measured = this.chosen().filter(isMeasured);
    const sentences = measured.length > 2 ? SENTENCES.many : SENTENCES.few;
    this.cards.replaceChildren(...measured.map((s) => verdictCard(s, this.theme, sentences, open.has(s.id))));
  }

  /** Show what is wrong with the data, a sentence each. */
  say(sentences) {
    const found = [...sentences];
    for (const series of this.chosen()) {
      if (series.leads) found.push(...series.errors.map((error) => `${series.run}: ${error}`));
      if (series.unread) found.push(`${series.label}: ${series.unread} ${series.unread === 1 ? 'record' : 'records'} could not be read, ${series.unread === 1 ? 'because' : 'the last one because'} ${series.why}.`);
    }
    if (!found.length && this.all.length && !this.chosen().length) found.push('No run is chosen.');
    if (sentences.length && !this.all.length) {
      this.page.hidden = false;
      this.empty.hidden = true;
    }
    this.notes.replaceChildren(...found.map((sentence) => el('p', {className: 'note'}, sentence)));
    this.notes.hidden = !found.length;
  }

  /** First and last step shown: the same for all charts. */
  range() {
    if (this.state.zoom) return this.state.zoom;
    let [first, last] = [Infinity, -Infinity];
    for (const series of this.chosen()) {
      for (const steps of [series.steps, ...(series.leads ? Object.values(series.scalars).map((s) => s.steps) : [])]) {
        if (steps.length) [first, last] = [Math.min(first, steps[0]), Math.max(last, steps.at(-1))];
      }
    }
    if (!(first <= last)) return [0, 1];
    const margin = first === last ? 1 : 0.012 * (last - first);
    return [first - margin, last + margin];
  }

  /** Show these steps only; all of them without arguments. */
  zoom(first, last) {
    this.state.zoom = first === undefined || !(last > first) ? null : [first, last];
    this.changed();
  }

  zoomBy(factor) {
    const [first, last] = this.range();
    const middle = this.cursor ?? (first + last) / 2;
    this.zoom(middle - factor * (middle - first), middle + factor * (last - middle));
  }

  /** Steps of all measurements that a chart shows, ascending. */
  stepsOf(chart) {
    const own = chart.spec.lines.length ? chart.spec.lines.filter((l) => !l.threshold).map((l) => l.steps) : [(chart.spec.density || chart.spec.layers).steps];
    return own.length === 1 ? own[0] : [...new Set(own.flat())].sort((a, b) => a - b);
  }

  /** Put the crosshair of all charts at the measurement next to a step, and return the rows that it shows. */
  point(chart, step, y, clientX, clientY) {
    const steps = chart ? this.stepsOf(chart) : [];
    this.cursor = steps.length ? steps[nearest(steps, step)] : null;
    this.drawCursors();
    this.tip.hidden = this.cursor === null;
    if (this.cursor === null) return [];
    const rows = chart.rows(this.cursor, y);
    this.tip.replaceChildren(
      el('div', {className: 'quiet'}, `step ${grouped(this.cursor)}`),
      el('table', {}, ...rows.map(([name, value, remark, colour]) => {
        const dot = el('i');
        dot.style.setProperty('--swatch', this.theme.run[colour]);
        return el('tr', {}, el('td', {}, dot, name), el('td', {}, value), el('td', {}, remark));
      })),
    );
    const {width, height} = this.tip.getBoundingClientRect();
    const right = clientX + BESIDE + width < window.innerWidth;
    this.tip.style.left = `${Math.max(4, right ? clientX + BESIDE : clientX - BESIDE - width)}px`;
    this.tip.style.top = `${Math.max(4, Math.min(clientY - 12, window.innerHeight - height - 6))}px`;
    return rows;
  }

  /** Move the crosshair by so many measurements, for the keyboard. */
  move(chart, by) {
    const [first, last] = this.range();
    const steps = this.stepsOf(chart).filter((s) => s >= first && s <= last);
    if (!steps.length || !chart.box) return;
    const from = this.cursor === null ? (by > 0 ? -1 : steps.length) : nearest(steps, this.cursor);
    const step = steps[Math.max(0, Math.min(steps.length - 1, from + by))];
    const box = chart.plot.getBoundingClientRect();
    const y = chart.box.top + chart.box.height / 2;
    const rows = this.point(chart, step, y, box.left + chart.x(step), box.top + y);
    this.heard.textContent = `step ${step}: ${rows.map(([name, value, remark]) => `${name} ${value} ${remark}`.trim()).join('; ')}`;
  }

  drawCursors() {
    if (this.drawing) return;
    this.drawing = true;
    requestAnimationFrame(() => {
      this.drawing = false;
      for (const chart of this.charts.values()) chart.drawCursor();
    });
  }
}

/** The colour that a name has by itself, or the next one after it that fewer runs have. */
function freeColour(hash, taken) {
  const order = Array.from({length: COLOURS}, (_, k) => (hash + k) % COLOURS);
  const uses = order.map((colour) => taken.filter((used) => used === colour).length);
  return order[uses.indexOf(Math.min(...uses))];
}

/** A number that depends on a text only (FNV-1a). */
function hashOf(text) {
  let hash = 0x811c9dc5;
  for (let k = 0; k < text.length; k += 1) hash = Math.imul(hash ^ text.charCodeAt(k), 0x01000193) >>> 0;
  return (hash ^ (hash >>> 16)) >>> 0;
}

/** How a run is going: its last measurement, and its last Newton step, in numbers and words. */
function verdictCard(series, theme, most, open) {
  const [kind, verdict] = badgeOf(series) || [];
  const card = el(
    'article',
    {className: 'card'},
    el('div', {className: 'row'}, el('h2', {title: series.label}, series.label), verdict ? el('span', {className: `pill ${kind}`}, verdict) : ''),
  );
  card.style.setProperty('--swatch', theme.run[series.colour]);
  const sentences = sentencesOf(series).map(typeset);
  const alarms = FAILED.includes(series.state) ? sentences.splice(0, ALARMS) : [];
  if (alarms.length) card.append(el('p', {className: 'alarm'}, alarms.join(' ')));
  const numbers = numbersOf(series);
  if (numbers.length) card.append(el('dl', {className: 'numbers'}, ...numbers));
  const steps = stepSentences(series);
  if (steps.length) card.append(el('ul', {}, ...steps.map((sentence) => el('li', {}, sentence))));
  const items = sentences.map((sentence) => el('li', {}, sentence));
  // The verdict and the sentence after it, which says what to do, stay in sight unless the run is stable.
  const least = kind === 'good' || alarms.length ? 0 : sentences.findIndex((sentence) => sentence.startsWith('In short')) + 2;
  const first = items.slice(0, Math.max(most, least));
  if (first.length) card.append(el('ul', {}, ...first));
  if (items.length > first.length) {
    const details = el('details', {open}, el('summary', {}, `${items.length - first.length} more`), el('ul', {}, ...items.slice(first.length)));
    details.dataset.id = series.id;
    card.append(details);
  }
  if (series.steps.length) {
    const how = Object.keys(series.values).some((name) => lastOf(series, name)?.current) ? {true: 'certified', false: 'tracked'}[series.certified.at(-1)] : '';
    const about = [measuredAt(series), how].filter(Boolean).join(' · ');
    card.append(el('div', {className: 'quiet foot'}, el('div', {}, about), series.remark ? el('div', {}, series.remark.replaceAll('`', '')) : ''));
  }
  return card;
}

/** The step of the last measurement, and that of the last scalar where it lies far ahead and more than an interval. */
function measuredAt(series) {
  const step = series.steps.at(-1);
  const last = series.leads ? Math.max(step, ...Object.values(series.scalars).map((scalar) => scalar.steps.at(-1) ?? 0)) : step;
  const far = last - step > Math.max(BEHIND * last, step - (series.steps.at(-2) ?? 0));
  return far ? `last measured at step ${grouped(step)} of ${grouped(last)}` : `step ${grouped(step)}`;
}

const isMeasured = (series) => series.steps.length > 0 || stepSentences(series).length > 0;

/** Class and text of the badge of a run, if there is anything to say. */
function badgeOf(series) {
  if (series.state in BADGES) return BADGES[series.state];
  const ratio = lastOf(series, 'stability_ratio');
  if (ratio?.current && Number.isFinite(ratio.value)) return BADGES[ratio.value < EDGE[0] ? 'below' : ratio.value <= EDGE[1] ? 'edge' : 'beyond'];
  const accepted = lastScalar(series, 'newton/accepted');
  return accepted && (accepted.value ? ['good', 'step accepted'] : ['warn', 'step rejected']);
}

/** The numbers on the card of a run. A number older than the last measurement says of which step it is. */
function numbersOf(series) {
  const numbers = [];
  const put = (name, label, remark = () => '') => {
    const last = lastOf(series, name);
    if (!last) return;
    const remarks = [remark(last.k), last.current ? '' : `step ${grouped(last.step)}`].filter(Boolean).join(', ');
    numbers.push(el('div', {}, el('dt', {}, label), el('dd', {}, shown(last.value), remarks ? el('small', {}, remarks) : '')));
  };
  const at = (name, k) => series.values[name]?.[k] ?? null;
  const between = (name) => (k) => interval(at(`${name}_lower`, k), at(`${name}_upper`, k));
  const threshold = (k) => (at('stability_threshold', k) === null ? '' : `threshold ${shown(at('stability_threshold', k))}`);
  put('lambda_max', 'largest eigenvalue', between('lambda_max'));
  if (isPreconditioned(series)) put('preconditioned_lambda_max', 'preconditioned eigenvalue', between('preconditioned_lambda_max'));
  put('stability_ratio', 'ratio to threshold', threshold);
  const highest = highestRatio(series);
  if (highest) numbers.push(el('div', {}, el('dt', {}, 'highest ratio'), el('dd', {}, shown(highest.value), el('small', {}, `step ${grouped(highest.step)}`))));
  put('lambda_min', 'smallest eigenvalue', between('lambda_min'));
  put('sharpness', 'sharpness');
  return numbers;
}

/** The highest stability ratio of a run and its step, where it was beyond the edge and is not the last one. */
function highestRatio(series) {
  const ratios = series.values.stability_ratio || [];
  let k = -1;
  ratios.forEach((ratio, i) => {
    if (Number.isFinite(ratio) && (k < 0 || ratio > ratios[k])) k = i;
  });
  const last = lastOf(series, 'stability_ratio');
  return k >= 0 && ratios[k] > EDGE[1] && series.steps[k] !== last.step ? {value: ratios[k], step: series.steps[k]} : null;
}

/** The last value that a monitor has measured, its step, and whether it is of the last measurement. */
function lastOf(series, name) {
  const values = series.values[name] || [];
  const k = values.findLastIndex((value) => value !== null);
  return k < 0 ? null : {value: values[k], k, step: series.steps[k], current: k === series.steps.length - 1};
}

/** The last point of a scalar. */
function lastScalar(series, tag) {
  const found = series.leads && series.scalars[tag];
  return found && found.steps.length ? {value: found.values.at(-1), step: found.steps.at(-1)} : null;
}

/** What the optimizer's last steps were like. */
function stepSentences(series) {
  const found = [];
  const last = (tag) => lastScalar(series, tag);
  const [ratio, accepted] = [last('newton/ratio'), last('newton/accepted')];
  const controls = ['damping', 'radius', 'sigma'].filter((name) => last(`newton/${name}`)).map((name) => `${name} ${shown(last(`newton/${name}`).value)}`);
  if (ratio || accepted || controls.length) {
    const parts = [accepted && (accepted.value ? 'accepted' : 'rejected'), ratio && `actual over predicted decrease ${shown(ratio.value, 3)}`, ...controls];
    const {step} = ratio || accepted || last('newton/damping') || last('newton/radius') || last('newton/sigma');
    found.push(`Last Newton step (step ${grouped(step)}): ${parts.filter(Boolean).join(', ')}.`);
  }
  for (const tag of tagsBeside(series, 'step_margin')) {
    const {steps, values} = series.scalars[tag];
    const margin = steps.length && {value: values.at(-1), step: steps.at(-1)};
    if (margin) found.push(`Step margin ${shown(margin.value, 3)} at step ${grouped(margin.step)}; above 1 a step overshoots.`);
    const [overshot, uphill, highest] = ['overshot_steps', 'uphill_steps', 'highest_step_margin'].map((name) => series.scalars[tag.replace(/step_margin$/, name)]?.values.at(-1));
    const share = (x) => `${shown(100 * x, 2)} %`;
    if (margin && Number.isFinite(overshot)) found.push(`${share(overshot)} of the measured steps overshot${uphill ? `, ${share(uphill)} went uphill` : ''}${Number.isFinite(highest) ? `; the highest margin was ${shown(highest, 3)}` : ''}.`);
  }
  return found;
}

/** A monitor's sentences in its own order. Without a failure, whether to trust the numbers comes first. */
function sentencesOf(series) {
  if (FAILED.includes(series.state)) return [...series.words];
  const isDoubt = (word) => word.startsWith('Nothing is certified');
  return [...series.words.filter(isDoubt), ...series.words.filter((word) => !isDoubt(word))];
}

function emptyPage() {
  return el(
    'div',
    {className: 'empty', hidden: true},
    el('h2', {}, 'No curvature here yet'),
    el('p', {}, 'This folder holds no measurements. Give your Lightning Trainer a CurvatureMonitor, and train with a TensorBoardLogger, or call add_to_tensorboard in a plain loop; the first measurement appears here by itself. What a plain loop writes with add_scalar alone stands under Scalars.'),
    el('pre', {}, 'from newtonopt.callbacks import CurvatureMonitor\n\ntrainer = Trainer(callbacks=[CurvatureMonitor(every_n_train_steps=100)])\ntrainer.fit(model, data)'),
  );
}

// --- The state in the address of TensorBoard's page ---------------------------------------------------------------

/** TensorBoard's document, if the page is allowed to look at it. */
function hostDocument() {
  try {
    return window.parent !== window && window.parent.document.body ? window.parent.document : null;
  } catch {
    return null;
  }
}

const hostWindow = () => (hostDocument() ? window.parent : window);

function readAddress() {
  const parts = new URLSearchParams(hostWindow().location.hash.slice(1).split('&').slice(1).join('&'));
  const found = {};
  if (parts.has('runs')) found.runs = parts.get('runs') === '' ? [] : parts.get('runs').split(',').map(decodeURIComponent);
  if (['linear', 'log'].includes(parts.get('scale'))) found.scale = parts.get('scale');
  const zoom = (parts.get('zoom') || '').split('_').map(Number);
  if (zoom.length === 2 && zoom.every(Number.isFinite) && zoom[1] > zoom[0]) found.zoom = zoom;
  return found;
}

function writeAddress(state) {
  const host = hostWindow();
  const parts = [host.location.hash.slice(1).split('&')[0]];
  const put = (key, value) => parts.push(`${key}=${encodeURIComponent(value)}`);
  if (state.runs) put('runs', state.runs.map(encodeURIComponent).join(','));
  if (state.scale !== 'auto') put('scale', state.scale);
  if (state.zoom) put('zoom', state.zoom.map((step) => Number(step.toPrecision(6))).join('_'));
  host.history.replaceState(host.history.state, '', `#${parts.join('&')}`);
}

/** TensorBoard calls this once the module has been loaded. */
export async function render() {
  const style = el('link', {rel: 'stylesheet', href: './style.css'});
  await new Promise((resolve) => {
    style.addEventListener('load', resolve);
    style.addEventListener('error', resolve);
    document.head.append(style);
  });
  document.title = 'Curvature';
  new Page();
}
