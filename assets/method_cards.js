// Runs once (ui/components/method_cards.py): shows the cards and tells which one is chosen.
// The cards are plain radio buttons, so that the arrow keys work as everywhere. In scope: element, props, trigger, watch.
const place = element.querySelector('.method-cards');
function draw() {
  const held = place.contains(document.activeElement) && document.activeElement.matches('input') ? document.activeElement.value : null;
  place.innerHTML = props.value || '';
  if (held) [...place.querySelectorAll('input')].find(one => one.value === held)?.focus();
}
place.addEventListener('change', event => {
  if (!event.target.matches('input[type=radio]')) return;
  place.querySelectorAll('.method-card').forEach(card => card.classList.toggle('chosen', card.contains(event.target)));
  trigger('choose', { method: event.target.value });
});
watch('value', draw);
draw();
