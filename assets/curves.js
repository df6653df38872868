// Runs once (ui/components/coefficients.py): a curve per expert over the layers. Points are dragged, or moved by keys:
// each is a slider. Only one point of each curve is a stop for the Tab key; left and right go on from there.
// In scope: element, props, trigger, watch.
const NS = 'http://www.w3.org/2000/svg', H = 220, LEFT = 44, RIGHT = 12, TOP = 12, BOTTOM = 30;
const svg = element.querySelector('svg'), legend = element.querySelector('.legend'), spoken = element.querySelector('.spoken');
let data = null, drag = null, stops = {}, timer = null, W = 600, front = 0;

function shape(tag, attributes, text) {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
const count = () => data.lines[0].values.length;
const X = i => LEFT + (count() > 1 ? i / (count() - 1) : 0.5) * (W - LEFT - RIGHT);
const Y = v => H - BOTTOM - (Math.min(data.high, Math.max(data.low, v ?? data.low)) - data.low) / (data.high - data.low) * (H - TOP - BOTTOM);
const round = v => Math.round(v * 100) / 100;
const clamp = v => Math.min(data.high, Math.max(data.low, v));

function draw() {
  const held = svg.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  svg.replaceChildren();
  legend.replaceChildren();
  if (!data) return;
  W = Math.max(240, svg.clientWidth || 600);
  svg.setAttribute('viewBox', `0 0 ${W} ${H}`);
  svg.setAttribute('aria-label', `${data.name} by layer`);
  const ticks = 4, every = Math.max(1, Math.ceil(count() / (W / 45)));
  for (let i = 0; i <= ticks; i++) {
    const v = data.low + (data.high - data.low) * i / ticks;
    svg.append(shape('line', { x1: LEFT, x2: W - RIGHT, y1: Y(v), y2: Y(v), class: 'grid' }));
    svg.append(shape('text', { x: LEFT - 6, y: Y(v) + 4, 'text-anchor': 'end', class: 'tick' }, Number(v.toPrecision(3))));
  }
  for (let i = 0; i < count(); i += every) svg.append(shape('text', { x: X(i), y: H - BOTTOM + 18, 'text-anchor': 'middle', class: 'tick' }, i === 0 ? 'layer 0' : i));
  front = Math.min(front, data.lines.length - 1);
  const order = data.lines.map((_, l) => l).filter(l => l !== front).concat(front); // the one in front is drawn last
  order.forEach(l => { const line = data.lines[l];
    svg.append(shape('polyline', { points: line.values.map((v, i) => `${X(i)},${Y(v)}`).join(' '), class: 'line', stroke: line.colour, 'stroke-dasharray': line.dash, opacity: line.fixed ? 0.45 : 1 }));
  });
  data.lines.forEach((line, l) => {
    const chip = document.createElement('button'), mark = document.createElement('i');
    chip.type = 'button';
    chip.setAttribute('aria-pressed', l === front);
    chip.addEventListener('click', () => { front = l; draw(); legend.children[l].focus(); });
    mark.style.borderTop = `3px ${line.dash ? 'dashed' : 'solid'} ${line.colour}`;
    chip.append(mark, line.title + (line.fixed ? ' (by conditions)' : ''));
    legend.append(chip);
  });
  order.forEach(l => {
    const line = data.lines[l];
    if (line.fixed) return;
    line.values.forEach((v, i) => {
      const key = `${l}.${i}`, stop = (stops[l] ?? 0) === i;
      svg.append(shape('circle', { cx: X(i), cy: Y(v), r: count() > 40 ? 4.5 : 7, fill: line.colour, tabindex: stop ? 0 : -1, role: 'slider', 'data-key': key,
        'aria-label': `${data.name} of ${line.title}, layer ${i}`, 'aria-orientation': 'vertical', 'aria-valuemin': data.low, 'aria-valuemax': data.high, 'aria-valuenow': v }));
    });
  });
  if (held) svg.querySelector(`[data-key="${held}"]`)?.focus();
}
function say(l, i) { spoken.textContent = `${data.lines[l].title}, layer ${i}: ${data.name} ${data.lines[l].values[i]}`; }
function set(l, i, value) { data.lines[l].values[i] = round(clamp(value)); draw(); say(l, i); }
function commit(l) { clearTimeout(timer); timer = setTimeout(() => { timer = null; trigger('commit', { expert: data.lines[l].expert, values: data.lines[l].values.slice() }); }, 120); }
function placeOf(node) { const key = node?.dataset?.key; return key ? key.split('.').map(Number) : null; }

svg.addEventListener('pointerdown', event => {
  const place = placeOf(event.target);
  if (!place) return;
  event.preventDefault();
  drag = place;
  front = place[0];
  stops[place[0]] = place[1];
  svg.setPointerCapture(event.pointerId);
  draw();
  svg.querySelector(`[data-key="${place.join('.')}"]`)?.focus();
});
svg.addEventListener('pointermove', event => {
  if (!drag) return;
  const box = svg.getBoundingClientRect(), y = (event.clientY - box.top) * H / box.height;
  set(...drag, data.low + (H - BOTTOM - y) / (H - TOP - BOTTOM) * (data.high - data.low));
});
const drop = () => { if (drag) { const l = drag[0]; drag = null; commit(l); } };
svg.addEventListener('pointerup', drop);
svg.addEventListener('pointercancel', drop);
svg.addEventListener('focusin', event => {
  const place = placeOf(event.target);
  if (!place) return;
  say(...place);
  if (place[0] !== front && !drag) { front = place[0]; draw(); }
});
new ResizeObserver(() => { if (!drag && Math.abs((svg.clientWidth || W) - W) > 4) draw(); }).observe(svg);
svg.addEventListener('keydown', event => {
  const place = placeOf(event.target);
  if (!place || event.ctrlKey || event.metaKey || event.altKey) return;
  const [l, i] = place, by = { ArrowUp: 0.05, ArrowDown: -0.05, PageUp: 0.2, PageDown: -0.2 }[event.key];
  const next = { ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: count() - 1 }[event.key];
  if (by) { event.preventDefault(); set(l, i, data.lines[l].values[i] + by); commit(l); }
  else if (next !== undefined) {
    event.preventDefault();
    stops[l] = Math.min(count() - 1, Math.max(0, next));
    draw();
    svg.querySelector(`[data-key="${l}.${stops[l]}"]`)?.focus();
  }
});
watch('value', () => { if (drag || timer) return; data = props.value ? JSON.parse(props.value) : null; draw(); });
data = props.value ? JSON.parse(props.value) : null;
draw();
