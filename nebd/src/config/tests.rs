use super::*;

fn export() -> ExportConfig {
    ExportConfig { volume: "a".into(), listen_unix: Some("/x".into()), ..ExportConfig::default() }
}

fn config(exports: Vec<ExportConfig>) -> Config {
    Config { exports, ..Config::default() }
}

fn one(export: ExportConfig) -> anyhow::Result<Checked> {
    Ok(config(vec![export]).check()?.remove(0))
}

fn refused(config: &Config, word: &str) {
    let why = format!("{:#}", config.check().expect_err(word));
    assert!(why.contains(word), "{why}");
}

#[test]
fn foreign_tcp_needs_a_decision() {
    let tcp = |text: &str| ExportConfig {
        volume: "disk0".into(),
        listen_tcp: Some(text.parse().expect("an address")),
        ..ExportConfig::default()
    };
    assert!(one(tcp("127.0.0.1:10809")).is_ok());
    assert!(one(tcp("[::1]:10809")).is_ok());
    refused(&config(vec![tcp("0.0.0.0:10809")]), "allow_insecure");
    assert!(one(ExportConfig { allow_insecure: true, ..tcp("0.0.0.0:10809") }).is_ok());
}

#[test]
fn what_is_missing_or_wrong_is_named() {
    assert_eq!(one(export()).expect("good").name, "a");
    refused(&config(vec![]), "volume");
    refused(&Config { user: Some(String::new()), ..config(vec![export()]) }, "user");
    for (bad, word) in [
        (ExportConfig { volume: String::new(), ..export() }, "volume"),
        (ExportConfig { volume: "../x".into(), ..export() }, "volume"),
        (ExportConfig { listen_unix: None, ..export() }, "listen"),
        (ExportConfig { name: "a\nb".into(), ..export() }, "name"),
        (ExportConfig { max_connections: 0, ..export() }, "max_connections"),
        (ExportConfig { handshake_seconds: 0, ..export() }, "handshake_seconds"),
        (ExportConfig { stuck_seconds: 3601, ..export() }, "stuck_seconds"),
        (ExportConfig { vhost_queues: 0, ..export() }, "vhost_queues"),
        (ExportConfig { vhost_queues: 17, ..export() }, "vhost_queues"),
        (ExportConfig { vhost_queue_size_max: 96, ..export() }, "vhost_queue_size_max"),
        (ExportConfig { vhost_queue_size_max: 2048, ..export() }, "vhost_queue_size_max"),
        (ExportConfig { vhost_threads: Some(0), ..export() }, "vhost_threads"),
        (ExportConfig { vhost_queues: 2, vhost_threads: Some(3), ..export() }, "vhost_threads"),
        (ExportConfig { serial: "x".repeat(21), ..export() }, "serial"),
        (ExportConfig { serial: "a\tb".into(), ..export() }, "serial"),
        (ExportConfig { serial: "ä".into(), ..export() }, "serial"),
    ] {
        refused(&config(vec![bad]), word);
    }
}

#[test]
fn exports_do_not_share_what_is_one_s_own() {
    let tcp = |volume: &str, port: u16| ExportConfig {
        volume: volume.into(),
        listen_tcp: Some(([127, 0, 0, 1], port).into()),
        ..ExportConfig::default()
    };
    let many: Vec<_> = (0..EXPORTS_MAX).map(|number| tcp(&format!("v{number}"), 0)).collect();
    assert_eq!(config(many.clone()).check().expect("distinct").len(), EXPORTS_MAX);
    refused(&config([many, vec![tcp("one-more", 0)]].concat()), "too many exports");
    refused(&config(vec![tcp("a", 1), tcp("a", 2)]), "volume is used twice");
    refused(&config(vec![tcp("a", 1), tcp("b", 1)]), "listen_tcp is used twice");
    let vhost =
        ExportConfig { volume: "b".into(), vhost_socket: Some("/x".into()), ..ExportConfig::default() };
    refused(&config(vec![export(), vhost.clone()]), "socket is used twice");
    refused(&config(vec![ExportConfig { listen_unix: Some("/x".into()), ..vhost }]), "socket is used twice");
}

#[test]
fn a_device_is_as_large_as_asked_for() {
    let device = ExportConfig {
        volume: "vm/web-1/root-and-more".into(),
        vhost_socket: Some("/v".into()),
        ..ExportConfig::default()
    };
    let checked = one(device.clone()).expect("good");
    assert!(checked.nbd.is_none());
    let vhost = checked.vhost.expect("a device");
    assert_eq!(vhost.serial, "vm/web-1/root-and-mo");
    assert_eq!((vhost.queues, vhost.queue_size_max), (16, 1024));
    assert!((1..=4).contains(&vhost.threads));
    let small =
        ExportConfig { vhost_queues: 1, serial: "S 1".into(), listen_unix: Some("/n".into()), ..device };
    let checked = one(small).expect("both");
    let vhost = checked.vhost.expect("a device");
    assert_eq!((vhost.threads, vhost.serial.as_str()), (1, "S 1"));
    assert!(checked.nbd.is_some());
}

#[test]
fn the_file_is_read_as_documented() {
    let text = "runtime_dir = \"/r\"\n[[export]]\nvolume = \"a\"\nlisten_unix = \"/a\"\n\
                [[export]]\nvolume = \"b\"\nvhost_socket = \"/b\"\nvhost_threads = 1\n";
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("nebd.toml");
    let read = |text: &str| {
        std::fs::write(&path, text).expect("writes");
        spline_process::config::load::<Config>(Some(&path))
    };
    let config = read(text).expect("reads");
    assert_eq!(config.check().expect("good").len(), 2);
    // What is printed is a config file.
    assert_eq!(read(&spline_process::config::print(&config).expect("prints")).expect("reads"), config);
    assert!(read("[[export]]\nvolume = \"a\"\nlisten_unxi = \"/a\"\n").is_err());
    assert!(read("[[export]]\nforce = true\n").is_err(), "a flag only");
}
