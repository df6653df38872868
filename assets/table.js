// Runs once per table (ui/components/table.py): shows props.value (JSON) and saves it. In scope: element, props, watch.
const MOST = 300; // rows in the page; the file has all
const summary = element.querySelector('summary'), scroll = element.querySelector('.numbers-scroll');
const count = element.querySelector('.numbers-tools span');
let table = null, order = null;

const whole = new Intl.NumberFormat('en'), PLAIN = { maximumSignificantDigits: 4 };
function shown(value) {
  if (value === null || value === undefined) return '';
  if (typeof value !== 'number') return String(value);
  if (Number.isInteger(value)) return whole.format(value);
  const size = Math.abs(value);
  return size < 1e-3 || size >= 1e7 ? value.toExponential(2) : value.toLocaleString('en', PLAIN);
}
function sorted() {
  if (!order) return table.rows;
  const { column, down } = order, sign = down ? -1 : 1;
  return [...table.rows].sort((a, b) => {
    const x = a[column], y = b[column];
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (typeof x === 'number' && typeof y === 'number' ? x - y : String(x).localeCompare(String(y), 'en', { numeric: true }));
  });
}
function cell(tag, text, numeric) {
  const one = document.createElement(tag);
  if (typeof text === 'string') one.textContent = text; else one.append(text);
  if (numeric) one.className = 'number';
  return one;
}
function draw() {
  const numeric = table.columns.map((_, i) => table.rows.some(row => typeof row[i] === 'number'));
  const head = document.createElement('tr'), body = document.createElement('tbody');
  table.columns.forEach((name, i) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = name.trim();
    button.dataset.column = i;
    const th = cell('th', button, numeric[i]);
    th.scope = 'col';
    if (order?.column === i) th.setAttribute('aria-sort', order.down ? 'descending' : 'ascending');
    head.append(th);
  });
  for (const row of sorted().slice(0, MOST)) {
    const tr = document.createElement('tr');
    tr.append(...row.map((value, i) => cell('td', shown(value), numeric[i])));
    body.append(tr);
  }
  const whole = document.createElement('table'), top = document.createElement('thead');
  top.append(head);
  whole.append(top, body);
  scroll.replaceChildren(whole);
}
function show() {
  element.classList.toggle('empty', !props.value);
  if (!props.value) { table = order = null; scroll.replaceChildren(); return; }
  const before = table?.columns.join('\n');
  table = JSON.parse(props.value);
  if (before !== table.columns.join('\n')) order = null;
  const rows = table.rows.length, label = props.label || 'The numbers';
  summary.textContent = `${label} (${rows} row${rows === 1 ? '' : 's'})`;
  scroll.setAttribute('aria-label', label);
  const notes = [];
  if (rows > MOST) notes.push(`${MOST} of ${rows} rows are shown; the CSV has all.`);
  if (table.total > rows) notes.push(`${table.total - rows} rows were too many to send.`);
  count.textContent = notes.join(' ');
  draw();
}
function csv() {
  // A text that a spreadsheet would take for a formula gets an apostrophe.
  const field = value => {
    if (value === null || value === undefined) return '';
    if (typeof value === 'number') return String(value);
    const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
    return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
  };
  return [table.columns.map(name => name.trim()), ...sorted()].map(row => row.map(field).join(',')).join('\r\n') + '\r\n';
}
element.addEventListener('click', event => {
  const column = event.target.dataset?.column;
  if (column !== undefined) {
    order = { column: +column, down: order?.column === +column ? !order.down : true };
    draw();
    scroll.querySelector(`[data-column="${column}"]`)?.focus();
  } else if (event.target.dataset?.csv !== undefined && table) {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob(['\ufeff', csv()], { type: 'text/csv' }));
    link.download = ((props.name || props.label || 'numbers').replace(/[^\w-]+/g, '-').replace(/^-+|-+$/g, '').toLowerCase().slice(0, 60) || 'numbers') + '.csv';
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
});
watch('value', show);
watch('label', show);
show();
