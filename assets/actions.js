// Runs once per list (ui/components/actions.py): shows the HTML, and tells Python which button or field in it was used.
// Drawing anew keeps the focus, also when its card has moved or is gone. In scope: element, props, trigger, watch.
const place = element.querySelector('.actions');
const cards = () => [...place.querySelectorAll('.item')];
const named = key => key ? [...place.querySelectorAll('[data-key]')].find(node => node.dataset.key === key) : null;
function draw() {
  const held = place.contains(document.activeElement) ? document.activeElement : null;
  const card = held ? cards().indexOf(held.closest('.item')) : -1, key = held?.dataset.key;
  const typed = held?.matches('input[type=text], input[type=number]') && held.value !== held.defaultValue ? held.value : null;
  const open = [...place.querySelectorAll('details[data-key]')].filter(d => d.open).map(d => d.dataset.key);
  place.innerHTML = props.value || '';
  for (const k of open) { const d = named(k); if (d) d.open = true; }
  if (!held) return;
  let next = named(key);
  if (next?.disabled) next = next.closest('.item')?.querySelector('button:not([disabled])');
  const near = card >= 0 ? cards()[Math.min(card, cards().length - 1)] : null; // renamed, or gone: what is in its place
  if (!next && near) next = near.querySelector(`[data-act="${held.dataset.act}"]:not([disabled])`) || near.querySelector('button:not([disabled])');
  if (typed !== null && next?.dataset.act === held.dataset.act) next.value = typed;
  (next || place).focus({ preventScroll: true });
}
function tell(node, value) { trigger('act', { act: node.dataset.act, of: node.dataset.of || '', value }); }
place.addEventListener('click', event => {
  const button = event.target.closest('button[data-act]');
  if (button && place.contains(button) && !button.disabled) tell(button, '');
});
place.addEventListener('change', event => {
  const field = event.target;
  if (!field.matches('input[data-act]')) return;
  const value = field.type === 'checkbox' ? field.checked : field.value;
  if (field.type !== 'checkbox') field.defaultValue = field.value;
  tell(field, value);
});
watch('value', draw);
draw();
