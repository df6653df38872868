// Runs once (ui/components/method_form.py): draws a method's settings from the description in props.value and tells
// each change. What the user holds is never written to: an answer that comes late must not move a slider under the
// finger. In scope: element, props, trigger, watch.
const form = element.querySelector('.method-form');
let shape = '', count = 0;
const waiting = new Map(); // key -> timer of a change that is not sent yet

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? '' : value);
  node.append(...children);
  return node;
}
const isList = value => Array.isArray(value);
const shown = value => value === null || value === undefined ? '' : String(value);

function send(change) {
  const key = [change.scope, change.expert, change.name].join('\n');
  clearTimeout(waiting.get(key));
  waiting.set(key, setTimeout(() => { waiting.delete(key); trigger('set', { change }); }, 120));
}

// One control: a slider with a box, a box, a check box or a list. `where`: {scope, expert, name}; `title`: its name.
function control(field, where, title) {
  const id = `setting-${++count}`, key = JSON.stringify(where), box = make('span', { class: 'control', 'data-key': key });
  if (field.layered) {
    const open = make('button', { type: 'button', 'aria-label': `${title}: edit by layer` }, 'by layer…');
    open.addEventListener('click', () => trigger('by_layer', { name: field.name }));
    box.append(open);
    return box;
  }
  if (field.kind === 'switch') {
    const check = make('input', { type: 'checkbox', id, 'aria-label': title });
    check.addEventListener('change', () => send({ ...where, value: check.checked }));
    box.append(check);
  } else if (field.kind === 'choice') {
    const list = make('select', { id, 'aria-label': title }, ...field.choices.map(word => make('option', { value: word }, word)));
    list.addEventListener('change', () => send({ ...where, value: list.value }));
    box.append(list);
  } else {
    const number = make('input', { type: 'number', id, 'aria-label': title, step: 'any', min: field.low, max: field.high, placeholder: field.required ? 'required' : shown(field.default) });
    const slider = field.slider && make('input', { type: 'range', 'aria-label': `${title}, slider`, min: field.slider[0], max: field.slider[1], step: field.step });
    const outside = value => (field.low !== null && (field.above ? value <= field.low : value < field.low)) || (field.high !== null && (field.below ? value >= field.high : value > field.high));
    const tell = value => { hint(box, field, value); send({ ...where, value }); if (where.scope === 'all') spread(field, value); };
    number.addEventListener('input', () => {
      const value = number.value === '' ? null : Number(number.value);
      const wrong = value === null ? (field.required || !number.validity.valid) : !Number.isFinite(value) || outside(value);
      box.classList.toggle('wrong', wrong);
      box.querySelector('.limits').textContent = wrong ? limits(field) : '';
      if (wrong) return;
      if (slider) slider.value = value === null ? field.default : value;
      tell(value);
    });
    slider?.addEventListener('input', () => {
      let value = Number(slider.value);
      if (outside(value)) { value = Number((field.above && value <= field.low ? field.low + field.step : field.high - field.step).toFixed(4)); slider.value = value; }
      box.classList.remove('wrong');
      number.value = value;
      tell(value);
    });
    if (slider) box.append(slider);
    box.append(number, make('span', { class: 'limits', role: 'status' }), make('span', { class: 'hint', role: 'status' }));
  }
  return box;
}
function limits(field) {
  const parts = [];
  if (field.low !== null) parts.push(`${field.above ? 'more than' : 'at least'} ${field.low}`);
  if (field.high !== null) parts.push(`${field.below ? 'less than' : 'at most'} ${field.high}`);
  return `A number${parts.length ? ', ' + parts.join(' and ') : ''}.`;
}
function hint(box, field, value) {
  const place = box.querySelector('.hint'), now = value === null || value === undefined ? field.default : value;
  if (place) place.textContent = field.hint && Number(now) === field.high ? field.hint : '';
}
// "All experts" was moved: show at once what the server will say.
function spread(field, value) {
  form.querySelectorAll('.control').forEach(box => {
    const where = JSON.parse(box.dataset.key);
    if (where.scope === 'expert' && where.name === field.name) put(box, field, value);
  });
}
function put(box, field, value) {
  if (isList(value)) return;
  for (const input of box.querySelectorAll('input, select')) {
    if (input === document.activeElement && input.type !== 'checkbox' && !input.matches('select')) continue;
    if (input.type === 'checkbox') input.checked = !!value;
    else if (input.type === 'range') input.value = value === null || value === undefined ? (field.default ?? field.slider[0]) : value;
    else input.value = shown(value);
  }
  if (!box.contains(document.activeElement)) { box.classList.remove('wrong'); const l = box.querySelector('.limits'); if (l) l.textContent = ''; }
  box.classList.toggle('missing', !!field.required && (value === null || value === undefined));
  hint(box, field, value);
}

function head(field) {
  return make('span', { class: 'name' }, field.label, ...(field.required ? [make('abbr', { title: 'required' }, ' *')] : []));
}
function build(data) {
  const parts = [];
  if (data.shared.length) {
    parts.push(make('h4', {}, 'The merge as a whole'));
    parts.push(make('div', { class: 'shared' }, ...data.shared.map(field => make('div', { class: 'setting' }, head(field),
      control(field, { scope: 'shared', name: field.name }, field.label), make('small', {}, field.help)))));
  }
  if (data.own.length) {
    const titles = data.own.map(field => make('th', { scope: 'col' }, head(field), make('small', {}, field.help)));
    const row = (name, off, cells) => make('tr', off ? { class: 'off' } : {}, make('th', { scope: 'row' }, name + (off ? ' (sits out)' : '')), ...cells.map(cell => make('td', {}, cell)));
    const rows = data.rows.map(r => row(r.name, !r.on, data.own.map(field => control({ ...field, layered: isList(r.values[field.name]) }, { scope: 'expert', expert: r.label, name: field.name }, `${field.label} of ${r.name}`))));
    if (data.rows.length > 1) rows.unshift(row('All experts', false, data.own.map(field => control({ ...field, required: false, default: null }, { scope: 'all', name: field.name }, `${field.label} of all experts`))));
    parts.push(make('h4', {}, 'Each expert'), make('div', { class: 'scroll' }, make('table', {}, make('thead', {}, make('tr', {}, make('td'), ...titles)), make('tbody', {}, ...rows))));
    if (!data.rows.length) parts.push(make('p', {}, 'No experts yet: choose them on the Experts page.'));
  }
  if (data.own.concat(data.shared).some(f => f.required)) parts.push(make('p', { class: 'legend' }, '* has no default: it must be set.'));
  if (!parts.length) parts.push(make('p', {}, `${data.method} has nothing to set.`));
  form.replaceChildren(...parts);
}
function fill(data) {
  const shared = new Map(data.shared.map(f => [f.name, f])), own = new Map(data.own.map(f => [f.name, f]));
  form.querySelectorAll('.control').forEach(box => {
    const { scope, expert, name } = JSON.parse(box.dataset.key);
    if (scope === 'shared') return put(box, shared.get(name), shared.get(name).value);
    const values = data.rows.filter(r => scope === 'all' || r.label === expert).map(r => r.values[name]);
    const same = values.every(v => JSON.stringify(v) === JSON.stringify(values[0])) && !isList(values[0]);
    if (scope === 'all') put(box, { ...own.get(name), required: false, default: null }, same ? values[0] : null);
    else put(box, own.get(name), values[0]);
    if (scope !== 'all' || same) return;
    const known = values.filter(v => typeof v === 'number'), slider = box.querySelector('input[type=range]');
    box.querySelector('input[type=number]')?.setAttribute('placeholder', 'different');
    if (slider && slider !== document.activeElement && known.length) slider.value = known.reduce((a, b) => a + b, 0) / known.length;
  });
}
function draw() {
  if (!props.value) { shape = ''; form.replaceChildren(make('p', {}, 'Choose a method above; its settings appear here.')); return; }
  const data = JSON.parse(props.value);
  data.shared = data.shared.map(f => ({ ...f, layered: isList(f.value) }));
  const form_ = JSON.stringify([data.method, data.shared.map(({ value, ...f }) => f), data.own, data.rows.map(r => [r.label, r.on, data.own.map(f => isList(r.values[f.name]))])]);
  if (form_ !== shape) { shape = form_; build(data); }
  fill(data);
}
watch('value', draw);
draw();
