"""A page with one heat map and one scatter plot, served as the workbench is: to click them and see what Python got."""

from __future__ import annotations

import argparse
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import plotly.graph_objects as go

from ui import launch
from ui.components.plot import Plot


def heat(shift: float) -> go.Figure:
    modules = ["q_proj", "k_proj", "v_proj"]
    figure = go.Figure(
        go.Heatmap(
            z=[[row * 3 + column + shift for column in range(3)] for row in range(4)], x=modules, y=list(range(4))
        )
    )
    return figure.update_layout(height=300).update_yaxes(range=[3.5, -0.5])


def scatter() -> go.Figure:
    return go.Figure(go.Scatter(x=[1, 2, 3], y=[3, 1, 2], customdata=["a", "b", "c"], name="run")).update_layout(
        height=250
    )


def told(event: gr.EventData) -> str:
    return json.dumps(event.points)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--data-dir", type=Path)
    data = options.parse_args().data_dir
    with gr.Blocks(analytics_enabled=False) as demo:
        plots = [
            Plot(heat(0), label="Change per layer", elem_id="heat"),
            Plot(scatter(), label="Runs", elem_id="scatter"),
        ]
        out = gr.Textbox(label="Told", elem_id="told")
        again = gr.Button("Again", elem_id="again")
        for plot in plots:
            plot.plot_click(told, None, out, api_visibility="private")
        shifts = iter(range(100, 1000, 100))
        again.click(lambda: heat(next(shifts)), None, plots[0], api_visibility="private")
    host, port = launch.listen_at(None, "auto")
    launch.start(demo, SimpleNamespace(data=data), host, port, launch.private_folder())
    print(f"open at http://{host}:{port} ", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
