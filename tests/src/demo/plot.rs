//! The timeline as a picture: one row per mode on one time axis.

use std::{path::Path, sync::Once};

use anyhow::{Context, Result, anyhow, bail};
use plotters::{coord::Shift, prelude::*, style::FontStyle};

use super::{Mode, Options, report, rollout::Run};

/// DejaVu Sans, cut down to Latin-1 and a few signs: a picture must not depend on the machine's fonts.
static FONT: &[u8] = include_bytes!("DejaVuSans-latin.ttf");

const WIDTH: u32 = 1200;
const HEADER: u32 = 62;
const ROW: u32 = 130;
const FOOTER: u32 = 40;
const COLUMN_US: u64 = 100_000;

const LOST: RGBColor = RGBColor(200, 30, 45);
const DEATH: RGBColor = RGBColor(120, 120, 130);
const INK: RGBColor = RGBColor(30, 32, 38);
const GOOD: RGBColor = RGBColor(20, 130, 70);

/// Refuse what can't be drawn before the demo runs for minutes.
pub(super) fn check(path: &Path) -> Result<()> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("svg" | "png") => Ok(()),
        _ => bail!("--plot {}: the name must end in .svg or .png", path.display()),
    }
}

pub(super) fn draw(path: &Path, options: &Options, runs: &[Run]) -> Result<()> {
    static REGISTER: Once = Once::new();
    REGISTER.call_once(|| {
        let known = plotters::style::register_font("sans-serif", FontStyle::Normal, FONT);
        debug_assert!(known.is_ok(), "the font that is built in is a font");
    });
    let size = (WIDTH, HEADER + ROW * runs.len() as u32 + FOOTER);
    let svg = path.extension().is_some_and(|extension| extension == "svg");
    let drawn = if svg {
        picture(&SVGBackend::new(path, size).into_drawing_area(), options, runs)
    } else {
        picture(&BitMapBackend::new(path, size).into_drawing_area(), options, runs)
    };
    drawn.with_context(|| format!("draw {}", path.display()))
}

fn picture<B: DrawingBackend>(area: &DrawingArea<B, Shift>, options: &Options, runs: &[Run]) -> Result<()>
where
    B::ErrorType: 'static,
{
    let longest = runs.iter().map(|run| run.end_us - run.start_us).max().unwrap_or(0);
    let columns = (longest / COLUMN_US + 1) as usize;
    let bars: Vec<Vec<usize>> =
        runs.iter().map(|run| report::count(&run.failures_us, run.start_us, COLUMN_US, columns)).collect();
    let most = bars.iter().flatten().copied().max().unwrap_or(0).max(1);

    area.fill(&WHITE).map_err(error)?;
    let (header, rest) = area.split_vertically(HEADER);
    header.draw_text("Requests lost during a rolling update", &font(24, &INK), (20, 10)).map_err(error)?;
    let connections = if options.keep_alive { "kept connections" } else { "new connections" };
    let mtls = if options.mtls { ", mTLS" } else { "" };
    let what = format!(
        "failures per 100 ms; {} requests/s on {connections}{mtls}, {} pods, control plane late by {}; dashed: a pod dies",
        options.rate, options.pods, options.control_plane_delay
    );
    header.draw_text(&what, &font(15, &DEATH), (20, 40)).map_err(error)?;
    let (rows, _) = rest.split_vertically(ROW * runs.len() as u32);
    for ((row, run), bars) in rows.split_evenly((runs.len(), 1)).iter().zip(runs).zip(&bars) {
        draw_row(row, run, bars, columns, most)?;
    }
    let note = "seconds since the first request";
    area.draw_text(note, &font(15, &INK), (WIDTH as i32 / 2 - 100, (HEADER + ROW * runs.len() as u32 + 12) as i32))
        .map_err(error)?;
    area.present().map_err(error)
}

fn draw_row<B: DrawingBackend>(
    row: &DrawingArea<B, Shift>,
    run: &Run,
    bars: &[usize],
    columns: usize,
    most: usize,
) -> Result<()>
where
    B::ErrorType: 'static,
{
    let seconds = |us: u64| us as f64 / 1e6;
    let width = seconds(COLUMN_US);
    let top = most as f64 * 1.15;
    let mut chart = ChartBuilder::on(row)
        .margin_top(26)
        .margin_right(20)
        .x_label_area_size(22)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..columns as f64 * width, 0.0..top)
        .map_err(error)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(228, 228, 232))
        .x_labels(columns / 10 + 1)
        .y_labels(4)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .label_style(font(13, &INK))
        .axis_style(RGBColor(170, 170, 178))
        .draw()
        .map_err(error)?;
    for death in &run.deaths_us {
        let x = seconds(death.saturating_sub(run.start_us));
        let line = DashedLineSeries::new([(x, 0.0), (x, top)], 4, 4, DEATH.stroke_width(1));
        chart.draw_series(line).map_err(error)?;
    }
    let bar = |(column, &count): (usize, &usize)| {
        let x = column as f64 * width;
        Rectangle::new([(x, 0.0), (x + width, count as f64)], LOST.filled())
    };
    chart.draw_series(bars.iter().enumerate().filter(|(_, count)| **count > 0).map(bar)).map_err(error)?;
    let title = format!("{}: {} of {} requests lost", label(run.mode), run.failed, run.requests);
    let color = if run.failed == 0 { &GOOD } else { &LOST };
    row.draw_text(&title, &font(17, color), (62, 5)).map_err(error)?;
    Ok(())
}

fn label(mode: Mode) -> &'static str {
    match mode {
        Mode::Classic => "classic",
        Mode::L1 => "L1 alone, know early",
        Mode::L2 => "L2 alone, choose well",
        Mode::L3 => "L3 alone, rebind",
        Mode::Hitless => "hitless",
    }
}

fn font<'a>(size: i32, color: &'a RGBColor) -> TextStyle<'a> {
    ("sans-serif", size).into_font().color(color)
}

fn error<E: std::error::Error + Send + Sync>(error: DrawingAreaErrorKind<E>) -> anyhow::Error {
    anyhow!("{error}")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Demo {
        #[command(flatten)]
        options: Options,
    }

    #[test]
    fn the_picture_is_an_svg_or_a_png_by_its_name() {
        let options = Demo::parse_from(["demo"]).options;
        let (classic, hitless) = (Run::of(Mode::Classic, 750, 25), Run::of(Mode::Hitless, 750, 0));
        let classic = Run { failures_us: vec![1_200_000; 25], deaths_us: vec![1_000_000], ..classic };
        let runs = [classic, hitless].map(|run| Run { end_us: 3_000_000, ..run });
        let directory = tempfile::tempdir().expect("a directory");
        let drawn = |name: &str| {
            let path = directory.path().join(name);
            check(&path).expect("can be drawn");
            draw(&path, &options, &runs).expect("drawn");
            std::fs::read(path).expect("written")
        };
        let svg = String::from_utf8(drawn("demo.svg")).expect("text");
        for said in ["classic: 25 of 750 requests lost", "hitless: 0 of 750 requests lost"] {
            assert!(svg.contains(said), "{said:?} is not in the picture");
        }
        let png = drawn("demo.png");
        // Its signature, then the header: width and height.
        assert_eq!(png[..8], *b"\x89PNG\r\n\x1a\n");
        assert_eq!(png[16..24], [WIDTH.to_be_bytes(), (HEADER + 2 * ROW + FOOTER).to_be_bytes()].concat());
        assert!(check(Path::new("demo.gif")).is_err());
    }
}
