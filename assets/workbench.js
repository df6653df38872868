// Runs once when the workbench opens: theme, tabs by address, keys, and the list of keys.
(() => {
  const store = {
    get: key => { try { return localStorage.getItem(key); } catch { return null; } },
    set: (key, value) => { try { localStorage.setItem(key, value); } catch { /* private window */ } },
  };
  const visible = node => !!node && node.offsetParent !== null;
  const one = selector => document.querySelector(selector);
  // A button as Gradio makes it: the id is on the button itself, or on a box around it.
  const button = id => { const node = document.getElementById(id); return node && (node.matches('button') ? node : node.querySelector('button')); };
  const press = id => { const b = button(id); if (visible(b) && !b.disabled) { b.click(); return true; } return false; };

  // -- theme: as the system, or as chosen in the settings ------------------------------------------------
  const system = matchMedia('(prefers-color-scheme: dark)');
  const wanted = () => { const t = store.get('amalgam-theme'); return t === 'dark' || (t !== 'light' && system.matches); };
  const paint = () => {
    if (document.body.classList.contains('dark') !== wanted()) document.body.classList.toggle('dark', wanted());
    document.documentElement.style.colorScheme = wanted() ? 'dark' : 'light';
  };
  window.amalgamTheme = choice => { if (choice) { store.set('amalgam-theme', choice); paint(); } return store.get('amalgam-theme') || 'system'; };
  paint();
  system.addEventListener('change', paint);
  new MutationObserver(paint).observe(document.body, { attributes: true, attributeFilter: ['class'] });

  // -- tabs: the address remembers the open one ------------------------------------------------------------
  const tabs = () => [...document.querySelectorAll('#pages > .tab-wrapper > [role="tablist"] > [role="tab"]')];
  const name = tab => tab.textContent.trim().toLowerCase();
  const remember = () => {
    const chosen = tabs().find(t => t.getAttribute('aria-selected') === 'true');
    if (chosen && location.hash.slice(1) !== name(chosen)) history.replaceState(null, '', '#' + name(chosen));
  };
  const follow = () => tabs().find(t => name(t) === location.hash.slice(1))?.click();
  const arrival = setInterval(() => { // the tabs come some time after this script
    if (!tabs().length) return;
    clearInterval(arrival);
    follow();
    new MutationObserver(remember).observe(tabs()[0].parentElement, { subtree: true, attributeFilter: ['aria-selected'] });
    setTimeout(remember, 300);
  }, 50);
  addEventListener('hashchange', follow);

  // -- the recipe as text, beside the pages -----------------------------------------------------------------
  window.amalgamText = (open = !document.body.classList.contains('text-open')) => {
    document.body.classList.toggle('text-open', open);
    button('as-text')?.setAttribute('aria-expanded', String(open));
    if (open) one('#yaml .cm-content')?.focus();
    dispatchEvent(new Event('resize')); // charts fit themselves to the room that is left
  };

  // -- keys ------------------------------------------------------------------------------------------------
  const typing = node => !!node && (node.matches('input:not([type=checkbox]):not([type=radio]):not([type=range]), textarea, select, [contenteditable="true"]') || !!node.closest('.cm-editor'));
  function run() {
    if (document.activeElement?.closest('#yaml')) return press('yaml-apply');
    const panel = [...document.querySelectorAll('[role="tabpanel"]')].find(p => visible(p));
    const main = [...(panel || document).querySelectorAll('button.run, .run button')].find(b => visible(b) && !b.disabled);
    main?.click();
    return !!main;
  }
  addEventListener('keydown', event => {
    const command = event.ctrlKey || event.metaKey, key = event.key.toLowerCase(), busy = typing(event.target);
    if (command && event.key === 'Enter') { if (run()) { event.preventDefault(); event.stopPropagation(); } }
    else if (command && key === 'z' && !busy) { event.preventDefault(); press(event.shiftKey ? 'redo' : 'undo'); }
    else if (command || event.altKey) return;
    else if (event.key === 'Escape') escape(event);
    else if (busy) return;
    else if (event.key === '?') { event.preventDefault(); help(); }
    else if (/^[1-9]$/.test(event.key)) {
      const tab = tabs()[+event.key - 1];
      if (tab) { event.preventDefault(); tab.click(); tab.focus(); }
    }
  }, true);
  function escape(event) {
    if (one('#keys-dialog')?.open || typing(event.target) || event.target.closest?.('[role="listbox"], [role="combobox"], dialog')) return;
    if (visible(button('stop')) && confirm('Stop the job that is running?')) press('stop');
  }
  function help() {
    let dialog = one('#keys-dialog');
    if (!dialog) {
      dialog = document.createElement('dialog');
      dialog.id = 'keys-dialog';
      dialog.setAttribute('aria-labelledby', 'keys-title');
      const title = document.createElement('h2'), list = document.createElement('dl'), close = document.createElement('button');
      title.id = 'keys-title';
      title.textContent = 'Keys';
      for (const [keys, what] of window.amalgamKeys || []) {
        const term = document.createElement('dt'), text = document.createElement('dd');
        term.textContent = keys;
        text.textContent = what;
        list.append(term, text);
      }
      close.textContent = 'Close';
      close.addEventListener('click', () => dialog.close());
      dialog.append(title, list, close);
      document.body.append(dialog);
    }
    if (!dialog.open) dialog.showModal();
  }
})();
