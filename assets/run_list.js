// The list of runs (ui/components/run_list.py): tells Python which boxes are ticked. A click on a row chooses it alone.
const boxes = () => [...element.querySelectorAll('input[data-run]')];
const tell = () => trigger('choose', { runs: boxes().filter(box => box.checked).map(box => box.dataset.run) });
element.addEventListener('change', event => { if (event.target.matches('input[data-run]')) tell(); });
element.addEventListener('click', event => {
  const row = event.target.closest('tr'), own = row?.querySelector('input[data-run]');
  if (!own || event.target.matches('input, a') || String(getSelection())) return;
  boxes().forEach(box => { box.checked = box === own; });
  tell();
});
// A new list may be drawn into the old boxes, which would stay ticked.
watch('value', () => boxes().forEach(box => { box.checked = box.hasAttribute('checked'); }));
