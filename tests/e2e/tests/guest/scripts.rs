//! The shell scripts that guests run, each behind what they share.

const SHARED: &str = include_str!("scripts/shared.sh");

/// `body` with the settings in front that it expects, such as `[("port", "10809")]`.
pub(crate) fn script(settings: &[(&str, String)], body: &str) -> String {
    let settings: String = settings.iter().map(|(name, value)| format!("{name}='{value}'\n")).collect();
    format!("{settings}{SHARED}\n{body}")
}
