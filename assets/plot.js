// Runs once per chart (ui/components/plot.py): draws props.value with plotly.js, tells Python what was clicked,
// and lets the keyboard do what the mouse can. In scope: element, props, trigger, watch,
// and TEMPLATES, the looks in light and dark.
const plot = element.querySelector('.plot-area'), spoken = element.querySelector('.plot-spoken');
const isDark = () => document.body.classList.contains('dark');
const template = () => TEMPLATES[isDark() ? 'dark' : 'light'];
const clear = { paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)' };
const CONFIG = {
  responsive: true, displaylogo: false, plotlyServerURL: '', showSendToCloud: false, showLink: false,
  modeBarButtonsToRemove: ['sendChartToCloud', 'sendDataToCloud', 'lasso2d', 'select2d', 'zoomIn2d', 'zoomOut2d', 'toImage'],
};
let cursor = null; // [trace, row, column] or [trace, point]

const point = p => ({
  curve: p.curveNumber, index: p.pointIndex ?? p.pointNumber, x: p.x, y: p.y, z: p.z ?? null,
  customdata: p.customdata ?? null, text: p.text ?? null, name: named(p.data?.name),
});
const traces = () => (plot._fullData || []).map((trace, number) => ({ trace, number })).filter(t => t.trace.visible === true);
const isMap = trace => trace.type === 'heatmap';
const at = (list, i) => Array.isArray(list) && Array.isArray(list[i]) ? list[i] : (list && list.length !== undefined ? list[i] : null);

function focused() {
  const trace = (plot._fullData || [])[cursor?.[0]];
  if (!trace) return null;
  const shown = value => value === undefined ? null : value;
  if (isMap(trace)) {
    const [, r, c] = cursor, z = trace.z[r]?.[c];
    return { curve: cursor[0], index: [r, c], x: at(trace.x, c) ?? (trace.x0 ?? 0) + c * (trace.dx ?? 1),
      y: at(trace.y, r) ?? (trace.y0 ?? 0) + r * (trace.dy ?? 1), z: shown(z), name: named(trace.name),
      customdata: shown(trace.customdata?.[r]?.[c] ?? trace.customdata?.[r]), text: shown(trace.text?.[r]?.[c]) };
  }
  const i = cursor[1];
  return { curve: cursor[0], index: i, x: shown(trace.x?.[i]), y: shown(trace.y?.[i]), z: null, name: named(trace.name),
    customdata: shown(trace.customdata?.[i]), text: shown(trace.text?.[i]) };
}
const named = name => name && !/^trace \d+$/.test(name) ? name : null; // plotly's own names are no names
const number = v => typeof v === 'number' ? (Number.isInteger(v) ? String(v) : v.toPrecision(4)) : (v ?? 'no value');
function read() {
  const p = focused();
  if (!p) return;
  const axis = (plot._fullData[p.curve].yaxis || 'y').replace('y', 'yaxis');
  const across = (plot._fullData[p.curve].xaxis || 'x').replace('x', 'xaxis');
  const label = (name, v) => { const t = plot._fullLayout[name]?.title?.text; return (t && t.length < 40 && !t.startsWith('Click') ? t.replace(/<[^>]*>/g, '') + ' ' : '') + number(v); };
  spoken.textContent = `${p.name ? p.name + ': ' : ''}${label(axis, p.y)}, ${label(across, p.x)}` + (p.z === null ? '' : `: ${number(p.z)}`);
}
// The mark is a shape of ours, last in the list of shapes.
function mark() {
  const p = focused();
  if (!p || p.x === null || p.y === null) return;
  const trace = plot._fullData[p.curve], accent = getComputedStyle(document.body).getPropertyValue('--mark').trim() || '#c2410c';
  const xa = plot._fullLayout[(trace.xaxis || 'x').replace('x', 'xaxis')], ya = plot._fullLayout[(trace.yaxis || 'y').replace('y', 'yaxis')];
  if (!xa || !ya) return;
  const x = xa.d2l ? xa.d2l(p.x) : p.x, y = ya.d2l ? ya.d2l(p.y) : p.y;
  const shape = { name: 'cursor', xref: trace.xaxis || 'x', yref: trace.yaxis || 'y', line: { color: accent, width: 3 }, type: 'rect' };
  if (isMap(trace)) {
    const step = (list, i) => { const a = list && typeof list[0] === 'number' && list.length > 1 ? Math.abs(list[1] - list[0]) : 1; return a / 2 || 0.5; };
    Object.assign(shape, { x0: x - step(trace.x), x1: x + step(trace.x), y0: y - step(trace.y), y1: y + step(trace.y) });
  } else {
    Object.assign(shape, { type: 'circle', xsizemode: 'pixel', ysizemode: 'pixel', xanchor: p.x, yanchor: p.y, x0: -8, x1: 8, y0: -8, y1: 8 });
  }
  Plotly.relayout(plot, { shapes: [...own.filter(one => one.name !== 'selected'), shape] }); // the cursor takes over
}
let own = [];
function move(step) {
  const list = traces();
  if (!list.length) return;
  if (!cursor) cursor = [list[0].number, 0, 0];
  else {
    let place = Math.max(0, list.findIndex(t => t.number === cursor[0]));
    let trace = list[place].trace;
    const up = trace.yaxis && plot._fullLayout[(trace.yaxis || 'y').replace('y', 'yaxis')]?.range;
    const down = up && up[0] > up[1] ? -1 : 1; // with layer 0 on top the axis runs downwards
    if (isMap(trace)) {
      let r = cursor[1] + step.y * down, c = cursor[2] + step.x;
      const rows = trace.z.length, columns = trace.z[0].length;
      if (c < 0 && place > 0) { place--; trace = list[place].trace; c = isMap(trace) ? trace.z[0].length - 1 : 0; }
      else if (c >= columns && place < list.length - 1) { place++; trace = list[place].trace; c = 0; }
      const R = isMap(trace) ? trace.z.length : rows, C = isMap(trace) ? trace.z[0].length : columns;
      cursor = [list[place].number, Math.min(R - 1, Math.max(0, r)), Math.min(C - 1, Math.max(0, c))];
    } else {
      if (step.y) place = Math.min(list.length - 1, Math.max(0, place - step.y));
      trace = list[place].trace;
      const count = trace.x?.length ?? trace._length ?? 1;
      cursor = [list[place].number, Math.min(count - 1, Math.max(0, cursor[1] + step.x)), 0];
    }
  }
  mark();
  read();
}
const STEPS = { ArrowUp: { x: 0, y: 1 }, ArrowDown: { x: 0, y: -1 }, ArrowLeft: { x: -1, y: 0 }, ArrowRight: { x: 1, y: 0 } };

function draw() {
  element.querySelector('.plot-frame').classList.toggle('empty', !props.value);
  if (typeof Plotly === 'undefined') { spoken.textContent = 'The chart could not be drawn: its script did not load.'; return; }
  if (!props.value) { if (plot.data) Plotly.purge(plot); plot.__wired = false; return; }
  const figure = JSON.parse(props.value);
  own = figure.layout?.shapes || [];
  cursor = null;
  spoken.textContent = '';
  // When a responsive chart is resized, plotly forgets its height and takes that of its box.
  plot.style.height = figure.layout?.height ? `${figure.layout.height}px` : '';
  plot.setAttribute('aria-label', (props.label || 'Chart') + '. Arrow keys move, Enter chooses.');
  Plotly.react(plot, figure.data, { ...figure.layout, ...clear, template: template() }, { ...CONFIG, ...(figure.config || {}) });
  if (plot.__wired) return;
  plot.__wired = true;
  plot.on('plotly_click', event => {
    const p = point(event.points[0]);
    cursor = Array.isArray(p.index) ? [p.curve, ...p.index] : [p.curve, p.index, 0];
    mark();
    read();
    trigger('plot_click', { points: event.points.map(point) });
  });
}
plot.tabIndex = 0;
plot.setAttribute('role', 'application');
plot.addEventListener('keydown', event => {
  if (event.target !== plot || event.ctrlKey || event.metaKey || event.altKey) return;
  if (STEPS[event.key]) { event.preventDefault(); event.stopPropagation(); move(STEPS[event.key]); }
  else if ((event.key === 'Enter' || event.key === ' ') && cursor) {
    event.preventDefault();
    trigger('plot_click', { points: [focused()] });
  }
});

function save(name, type, text) {
  const link = document.createElement('a');
  link.href = type ? URL.createObjectURL(new Blob([text], { type })) : text;
  link.download = name;
  link.click();
  if (type) setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
element.querySelector('.plot-tools').addEventListener('click', async event => {
  const kind = event.target.dataset.save;
  if (!kind || !props.value) return;
  const name = (props.label || 'chart').replace(/[^\w-]+/g, '-').replace(/^-+|-+$/g, '').toLowerCase().slice(0, 60) || 'chart';
  if (kind === 'json') return save(`${name}.json`, 'application/json', props.value);
  const box = plot.getBoundingClientRect(), background = isDark() ? '#15181c' : '#ffffff';
  const figure = { data: plot.data, layout: { ...plot.layout, shapes: own, paper_bgcolor: background, plot_bgcolor: background } };
  save(`${name}.${kind}`, '', await Plotly.toImage(figure, { format: kind, width: box.width, height: box.height, scale: 2 }));
});

watch('value', draw);
const themes = new MutationObserver(() => {
  if (!element.isConnected) return themes.disconnect();
  if (props.value && plot.data) Plotly.relayout(plot, { template: template() });
});
themes.observe(document.body, { attributes: true, attributeFilter: ['class'] });
draw();
