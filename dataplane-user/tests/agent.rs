//! The `hitless` binary as a user runs it: its sources, its admin socket, its stops. Needs root.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::{
        fs::{PermissionsExt as _, symlink},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use dataplane_ebpf::health::State;
use dataplane_user::kernel::{Config, cgroup2_root, snapshot};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(20);

/// A directory, a BPF file system and a cgroup of the test's own, gone when it is dropped.
struct Site {
    directory: tempfile::TempDir,
    cgroup: PathBuf,
}

impl Site {
    fn new(name: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let bpffs = directory.path().join("bpf");
        fs::create_dir(&bpffs).expect("a directory");
        mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), None::<&str>)
            .expect("mounting a BPF file system needs root");
        let cgroup =
            cgroup2_root().expect("cgroup2 is mounted").join(format!("hl-agent-{name}-{}", std::process::id()));
        fs::create_dir(&cgroup).expect("a cgroup needs root");
        Self { directory, cgroup }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn config(&self) -> Config {
        Config { cgroup: Some(self.cgroup.clone()), bpffs: self.path("bpf"), ..Config::default() }
    }

    fn hitless(&self, command: &str) -> Command {
        let mut hitless = Command::new(env!("CARGO_BIN_EXE_hitless"));
        hitless.arg(command).arg("--state-dir").arg(self.path("run")).arg("--bpffs").arg(self.path("bpf"));
        hitless.arg("--cgroup").arg(&self.cgroup);
        hitless
    }

    fn agent(&self, source: &str, args: &[&str]) -> Agent {
        let log = fs::File::create(self.path("log")).expect("a log");
        let mut run = self.hitless("run");
        run.arg("--source").arg(source).arg("--ready-file").arg(self.path("ready"));
        // The canary has a test of its own.
        run.args(["--canary", "off"]).args(args).stderr(log).stdout(Stdio::null());
        Agent(run.spawn().expect("it starts"))
    }

    /// What `hitless config dump` prints.
    fn dump(&self, args: &[&str]) -> String {
        let mut hitless = Command::new(env!("CARGO_BIN_EXE_hitless"));
        hitless.args(["config", "dump"]).arg("--state-dir").arg(self.path("run")).args(args);
        let Output { status, stdout, stderr } = hitless.output().expect("it runs");
        assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
        String::from_utf8(stdout).expect("text")
    }

    fn json(&self, command: &str) -> Value {
        let Output { stdout, stderr, .. } = self.hitless(command).args(["--output", "json"]).output().expect("it runs");
        serde_json::from_slice(&stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&[stdout, stderr].concat())))
    }

    /// The addresses of the backends in force.
    fn backends(&self) -> Vec<String> {
        let rows = self.json("endpoints");
        let rows = rows.as_array().expect("a list").iter();
        rows.filter_map(|row| Some(row["backend"]["address"].as_str()?.to_owned())).collect()
    }

    fn wait(&self, what: &str, mut until: impl FnMut() -> bool) {
        let began = Instant::now();
        while !until() {
            if began.elapsed() > PATIENCE {
                panic!("no {what}; the agent's log:\n{}", fs::read_to_string(self.path("log")).unwrap_or_default());
            }
            sleep(Duration::from_millis(20));
        }
    }

    fn wait_ready(&self) {
        self.wait("ready file", || self.path("ready").exists());
    }

    fn stream(&self) -> Stream {
        self.wait("source socket", || UnixStream::connect(self.path("source")).is_ok());
        Stream(BufReader::new(UnixStream::connect(self.path("source")).expect("it listens")))
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = self.hitless("uninstall").output();
        let _ = fs::remove_dir(&self.cgroup);
        let _ = umount2(&self.path("bpf"), MntFlags::MNT_DETACH);
    }
}

struct Agent(Child);

impl Agent {
    fn stop(&mut self, signal: Signal) -> bool {
        kill(Pid::from_raw(self.0.id().cast_signed()), signal).expect("it runs");
        self.0.wait().expect("it ends").success()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Stream(BufReader<UnixStream>);

impl Stream {
    fn send(&mut self, line: impl std::fmt::Display) -> Value {
        writeln!(self.0.get_mut(), "{line}").expect("the agent reads");
        let mut answer = String::new();
        self.0.read_line(&mut answer).expect("the agent answers");
        serde_json::from_str(&answer).expect("a line of JSON")
    }
}

fn services(backends: &[&str]) -> String {
    let mut text =
        "services:\n- {name: shop/web, addresses: [192.0.2.10], ports: [{port: 80}]}\nbackends:\n".to_owned();
    for address in backends {
        text += &format!("- {{service: shop/web, address: {address}, targetPort: 8080}}\n");
    }
    text
}

/// As config tools do: a new file takes the name.
fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).expect("writable");
    fs::rename(&new, path).expect("renamed");
}

#[test]
fn a_bad_file_is_told_by_place_and_field_and_the_last_good_state_stays() {
    let site = Site::new("file");
    let file = site.path("services.yaml");
    fs::write(&file, services(&["192.0.2.1", "192.0.2.2"])).expect("writable");
    let _agent = site.agent(&format!("file:{}", file.display()), &[]);
    site.wait_ready();
    assert_eq!(site.backends(), ["192.0.2.1:8080", "192.0.2.2:8080"]);

    let error = || site.json("status")["source"]["error"].as_str().unwrap_or_default().to_owned();
    replace(&file, &services(&["192.0.2.1", "192.0.2.999"]));
    site.wait("error", || !error().is_empty());
    assert_eq!(error(), format!("{}:5:32: field address: invalid IP address syntax", file.display()));
    replace(&file, "# about to be written\n");
    site.wait("other error", || error().contains("the file is empty"));
    fs::remove_file(&file).expect("removed");
    site.wait("third error", || error().contains("No such file"));
    assert_eq!(site.backends(), ["192.0.2.1:8080", "192.0.2.2:8080"]);
    assert_eq!(site.json("status")["ready"], true);

    replace(&file, &services(&["192.0.2.3"]));
    site.wait("new state", || site.backends() == ["192.0.2.3:8080"]);
    assert_eq!(error(), "");
}

#[test]
fn one_bad_object_is_skipped_and_named_and_the_rest_is_in_force() {
    let site = Site::new("object");
    let file = site.path("services.yaml");
    let stray = "- {service: shop/nobody, address: 192.0.2.9, targetPort: 8080}\n";
    fs::write(&file, services(&["192.0.2.1", "2001:db8::1"]) + stray).expect("writable");
    let _agent = site.agent(&format!("file:{}", file.display()), &[]);
    site.wait_ready();
    assert_eq!(site.backends(), ["192.0.2.1:8080"]);
    assert_eq!(
        site.json("status")["source"]["problems"],
        json!([
            "backend 192.0.2.9:8080 of shop/nobody: there is no service shop/nobody",
            "backend [2001:db8::1]:8080 of shop/web: service shop/web has no IPv6 address",
        ])
    );
}

/// How the kubelet updates a ConfigMap: the files are links through `..data`, which is renamed over.
#[test]
fn a_config_map_is_followed_through_its_links() {
    let site = Site::new("configmap");
    let volume = site.path("volume");
    for (version, address) in [("..1", "192.0.2.1"), ("..2", "192.0.2.2")] {
        fs::create_dir_all(volume.join(version)).expect("a directory");
        fs::write(volume.join(version).join("services.yaml"), services(&[address])).expect("writable");
    }
    symlink("..1", volume.join("..data")).expect("a link");
    symlink("..data/services.yaml", volume.join("services.yaml")).expect("a link");
    let _agent = site.agent(&format!("file:{}", volume.join("services.yaml").display()), &[]);
    site.wait_ready();
    assert_eq!(site.backends(), ["192.0.2.1:8080"]);

    symlink("..2", volume.join("..data_tmp")).expect("a link");
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).expect("renamed");
    site.wait("state of the new version", || site.backends() == ["192.0.2.2:8080"]);
}

#[test]
fn an_answer_on_the_stream_means_that_it_is_in_the_maps() {
    let site = Site::new("stream");
    let mut agent = site.agent(&format!("stream:{}", site.path("source").display()), &[]);
    let mut stream = site.stream();
    let backend = |n: u8| json!({"kind": "backend", "service": "shop/web", "address": format!("192.0.2.{n}"), "targetPort": 8080, "pod": format!("shop/web-{n}")});
    let service = json!({"name": "shop/web", "addresses": ["192.0.2.10"], "ports": [{"port": 80}]});
    let answer = stream.send(json!({"op": "sync", "state": {"services": [service]}}).to_string());
    assert_eq!(answer["ok"], true, "{answer}");
    site.wait_ready();
    let living = || {
        let state = snapshot(&site.config()).expect("readable").and_then(|snapshot| snapshot.state).expect("ours");
        state.seed.backends.iter().filter(|(.., health)| health.state() == State::Ready).count()
    };
    for n in 1..=3 {
        let answer = stream.send(json!({"op": "upsert", "object": backend(n)}).to_string());
        assert_eq!((&answer["ok"], living()), (&json!(true), n.into()), "{answer}");
        assert!(answer["applied_ns"].is_u64() && answer["lag_ns"].is_u64(), "{answer}");
    }
    let answer = stream.send(r#"{"op":"delete","object":{"kind":"pod","name":"shop/web-2"}}"#);
    assert_eq!((&answer["ok"], living()), (&json!(true), 2), "{answer}");
    assert!(answer["changes"].as_u64().is_some_and(|changes| changes <= 6), "{answer}");

    let answer = stream.send(r#"{"op":"upsert","object":{"kind":"pod"}}"#);
    assert_eq!((&answer["ok"], &answer["line"]), (&json!(false), &json!(6)), "{answer}");
    assert!(answer["error"].as_str().is_some_and(|error| error.contains("missing field `name`")), "{answer}");
    let weightless =
        json!({"kind": "backend", "service": "shop/web", "address": "192.0.2.4", "targetPort": 8080, "weight": 0});
    let answer = stream.send(json!({"op": "upsert", "object": weightless}).to_string());
    assert_eq!(answer["ok"], false, "{answer}");

    // Others may speak too, and who leaves takes nothing back.
    let mut other = site.stream();
    assert_eq!(other.send(json!({"op": "upsert", "object": backend(5)}).to_string())["ok"], true);
    drop((stream, other));
    assert_eq!(site.backends().len(), 3);

    // A killed agent's successor is told the same and changes nothing.
    agent.stop(Signal::SIGKILL);
    assert_eq!(living(), 3, "the kernel goes on without an agent");
    let _agent = site.agent(&format!("stream:{}", site.path("source").display()), &[]);
    let mut stream = site.stream();
    let backends: Vec<_> = [1, 3, 5]
        .map(|n| {
            let mut object = backend(n);
            object.as_object_mut().expect("an object").remove("kind");
            object
        })
        .into();
    let state = json!({"services": [service], "backends": backends});
    let answer = stream.send(json!({"op": "sync", "state": state}).to_string());
    assert_eq!((&answer["ok"], &answer["changes"]), (&json!(true), &json!(0)), "{answer}");
}

#[test]
fn a_stop_keeps_the_kernel_path_unless_told_otherwise_and_a_second_agent_is_refused() {
    let site = Site::new("stop");
    let file = site.path("services.yaml");
    fs::write(&file, services(&["192.0.2.1"])).expect("writable");
    let source = format!("file:{}", file.display());
    let mut agent = site.agent(&source, &[]);
    site.wait_ready();

    let second = site.hitless("run").args(["--source", &source]).output().expect("it runs");
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success() && said.contains("another agent uses"), "{said}");
    let uninstall = site.hitless("uninstall").output().expect("it runs");
    assert!(!uninstall.status.success(), "nothing is taken from under a running agent");
    assert!(site.backends().len() == 1);

    assert!(agent.stop(Signal::SIGTERM), "a clean stop is a success");
    assert!(!site.path("ready").exists());
    let pinned = site.json("status");
    assert_eq!(pinned["agent"], Value::Null);
    assert!(pinned["kernel"]["links"].as_array().is_some_and(|links| !links.is_empty()), "{pinned}");

    let mut agent = site.agent(&source, &["--on-exit", "uninstall"]);
    site.wait_ready();
    assert!(agent.stop(Signal::SIGINT));
    assert!(!site.path("bpf/hitless").exists(), "everything pinned is gone");
}

#[test]
fn what_config_dump_prints_starts_an_agent_of_the_same_state() {
    let site = Site::new("dump");
    let file = site.path("services.yaml");
    let more = "pods:\n- {name: shop/web-1, netns: /nowhere, stopSignals: [QUIT], addresses: [192.0.2.1]}\n\
                - {name: shop/web-2, terminating: true}\nnodes:\n- {name: n-1, addresses: [192.0.2.200]}\n";
    let stray = "- {service: shop/nobody, address: 192.0.2.9, targetPort: 8080, pod: shop/web-2, weight: 3}\n";
    fs::write(&file, services(&["192.0.2.1", "192.0.2.2"]) + stray + more).expect("writable");
    let mut agent = site.agent(&format!("file:{}", file.display()), &["--syn-limit", "4"]);
    site.wait_ready();
    let (endpoints, state) = (site.json("endpoints"), site.dump(&["--state"]));
    let options: Value = serde_json::from_str(&site.dump(&["--output", "json"])).expect("JSON");
    assert_eq!((&options["config"]["syn-limit"], &options["from"]["syn-limit"]), (&json!(4), &json!("flag")));
    assert_eq!((&options["config"]["max-replays"], &options["from"]["max-replays"]), (&json!(3), &json!("default")));
    assert!(site.dump(&["--output", "table"]).lines().any(|line| line.starts_with("syn-limit")));
    fs::write(site.path("config.yaml"), site.dump(&[])).expect("writable");
    fs::write(site.path("state.yaml"), &state).expect("writable");
    assert!(agent.stop(Signal::SIGTERM));

    let log = fs::File::create(site.path("log")).expect("a log");
    let mut run = Command::new(env!("CARGO_BIN_EXE_hitless"));
    run.arg("run").arg("--config").arg(site.path("config.yaml"));
    run.arg(format!("--source=file:{}", site.path("state.yaml").display()));
    let _agent = Agent(run.stderr(log).stdout(Stdio::null()).spawn().expect("it starts"));
    site.wait_ready();
    assert_eq!(site.json("endpoints"), endpoints);
    assert_eq!(site.dump(&["--state"]), state);
    let options: Value = serde_json::from_str(&site.dump(&["--output", "json"])).expect("JSON");
    assert_eq!((&options["config"]["syn-limit"], &options["from"]["syn-limit"]), (&json!(4), &json!("file")));
    assert_eq!(options["from"]["source"], "flag");
}

/// A GET of the agent's metrics listener: status line and body.
fn get(at: std::net::SocketAddr, path: &str) -> Option<(String, String)> {
    use std::io::Read;
    let mut stream = std::net::TcpStream::connect(at).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.lines().next()?.to_owned(), body.to_owned()))
}

/// The value of a sample, by its name with labels as they are written.
fn sample(text: &str, name: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().expect("a number")
}

#[test]
fn readiness_is_told_and_metrics_move_by_what_happened_and_a_hostile_client_hurts_nobody() {
    let site = Site::new("metrics");
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("it is bound");
    let source = format!("stream:{}", site.path("source").display());
    let _agent = site.agent(&source, &["--metrics-address", &free.to_string()]);
    let mut stream = site.stream();
    let (status, body) = get(free, "/readyz").expect("an answer");
    assert!(status.contains("503") && body.contains("first full state"), "{status} {body}");
    assert!(get(free, "/healthz").expect("an answer").0.contains("200"));

    let backend = json!({"service": "a/b", "address": "10.0.0.1", "targetPort": 80, "pod": "a/p-1"});
    stream.send(json!({"op": "sync", "state": {
        "services": [{"name": "a/b", "addresses": ["10.9.9.9"], "ports": [{"port": 80}]}],
        "backends": [backend], "pods": [{"name": "a/p-1", "addresses": ["10.0.0.1"]}]}}));
    site.wait("readiness", || get(free, "/readyz").is_some_and(|(status, _)| status.contains("200")));

    // Deleted first, and only then does the control plane say that its endpoint is gone.
    stream.send(json!({"op": "upsert", "object": {"kind": "pod", "name": "a/p-1", "terminating": true}}));
    sleep(Duration::from_millis(300));
    stream.send(json!({"op": "delete", "object":
        {"kind": "backend", "service": "a/b", "address": "10.0.0.1", "targetPort": 80}}));
    let (_, text) = get(free, "/metrics").expect("an answer");
    assert_eq!(sample(&text, "hitless_drains_total{first=\"api\"}"), 1.0);
    assert_eq!(sample(&text, "hitless_control_plane_lag_seconds_count{first=\"api\"}"), 1.0);
    let lag = sample(&text, "hitless_control_plane_lag_seconds_sum{first=\"api\"}");
    assert!((0.2..60.0).contains(&lag), "{lag}");
    assert_eq!(sample(&text, "hitless_endpoint_lag_seconds_count{signal=\"api\"}"), 2.0);
    assert_eq!(sample(&text, "hitless_objects{kind=\"service\"}"), 1.0);
    assert_eq!(sample(&text, "hitless_map_entries{map=\"FRONTENDS\"}"), 1.0);
    assert!(sample(&text, "process_resident_memory_bytes") > 1e6);

    let ask = |command: &[&str]| {
        let mut hitless = Command::new(env!("CARGO_BIN_EXE_hitless"));
        let out = hitless.args(command).arg("--output=json").arg("--state-dir").arg(site.path("run")).output();
        serde_json::from_slice::<Value>(&out.expect("it runs").stdout).expect("JSON")
    };
    let drain = ask(&["drain", "watch", "--once"]);
    assert_eq!((&drain["pod"], &drain["first"]), (&json!("a/p-1"), &json!("api")));
    assert!(drain["controlPlaneNs"].as_u64() > drain["apiNs"].as_u64(), "{drain}");
    let report = ask(&["rollout", "report"]);
    assert_eq!((&report[0]["workload"], &report[0]["pods"]), (&json!("a/p"), &json!(1)));
    assert_eq!(ask(&["connections"]), json!([]));

    // Garbage, silence and more clients than there are places, on the admin socket.
    let path = site.path("run/hitless.sock");
    let mut garbage = UnixStream::connect(&path).expect("it listens");
    let _ = garbage.write_all(&[0xff; 4096]);
    let silent: Vec<_> = (0..100).map(|_| UnixStream::connect(&path).expect("it listens")).collect();
    assert!(get(free, "/healthz").expect("an answer").0.contains("200"));
    drop(silent);
    site.wait("a status after all that", || {
        let out = site.hitless("status").args(["--output", "json"]).output().expect("it runs");
        out.status.success()
    });
}

/// What the chart grants where `privileged` is forbidden.
fn granted() -> Vec<String> {
    let values: Value =
        serde_saphyr::from_str(include_str!("../../deploy/chart/hitless/values.yaml")).expect("the chart's values");
    let names = values["securityContext"]["capabilities"].as_array().expect("a list").iter();
    names.map(|name| name.as_str().expect("a name").to_lowercase()).collect()
}

/// What an agent with these capabilities alone lacks to serve a pod that has more; nothing: it is ready.
fn lacks(site: &Site, source: &str, capabilities: &[String]) -> Option<String> {
    let kept: String = capabilities.iter().map(|name| format!(",+{name}")).collect();
    let run = site.hitless("run");
    let mut confined = Command::new("setpriv");
    confined.args(["--inh-caps=-all", "--ambient-caps=-all"]).arg(format!("--bounding-set=-all{kept}"));
    confined.arg(run.get_program()).args(run.get_args()).args(["--source", source]);
    let log = fs::File::create(site.path("log")).expect("a log");
    let mut agent = Agent(confined.stderr(log).spawn().expect("setpriv is there"));
    let mut lack = None;
    site.wait("verdict", || {
        if let Some(status) = agent.0.try_wait().expect("it can be waited for") {
            lack = Some(format!("it ended ({status})"));
            return true;
        }
        let status = site.json("status");
        let patient = ["the first full state", "pod ", "the hooks to be proved"];
        let waiting = status["waitingFor"].as_str();
        let waiting = waiting.filter(|what| !patient.iter().any(|start| what.starts_with(start)));
        lack = status["pods"][0]["error"].as_str().or(waiting).map(str::to_owned);
        lack.is_some() || (status["ready"] == true && status["pods"][0]["attached"] == true)
    });
    agent.stop(Signal::SIGTERM);
    lack
}

#[test]
fn the_capabilities_of_the_chart_are_enough_and_each_is_needed() {
    let site = Site::new("capabilities");
    // As the root of the hierarchy is, where a cluster's agents are.
    fs::set_permissions(&site.cgroup, fs::Permissions::from_mode(0o555)).expect("it is ours");
    let pod = Agent(Command::new("unshare").args(["--net", "sleep", "300"]).spawn().expect("unshare is there"));
    let netns = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).expect("readable");
    site.wait("network namespace", || netns(&pod.0.id().to_string()) != netns("self"));
    let file = site.path("services.yaml");
    fs::write(&file, format!("{}pods:\n- {{name: shop/web-1, pid: {}}}\n", services(&["192.0.2.1"]), pod.0.id()))
        .expect("writable");
    let source = format!("file:{}", file.display());

    let all = granted();
    assert_eq!(lacks(&site, &source, &all), None);
    // CAP_SYS_ADMIN stands for the two that were split off it (Linux 5.8).
    for needed in all.iter().filter(|name| !matches!(name.as_str(), "bpf" | "perfmon")) {
        let rest: Vec<_> = all.iter().filter(|name| *name != needed).cloned().collect();
        let lack = lacks(&site, &source, &rest);
        assert!(lack.is_some(), "it does without {needed}");
    }
}
