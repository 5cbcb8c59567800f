//! One carried connection as logs and metrics tell it: with the field names of Istio's access logs, at target `access`.

use std::{
    net::SocketAddr,
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Instant,
};

use super::{
    Shared,
    carried::Place,
    traffic::{End, Flags, Reporter, Series, Tally},
    worker::Worker,
};
use crate::{hbone::relay::Counts as Bytes, identity::SpiffeId, mesh::Workload, model::short_name};

/// Who talks to whom. What is not known is None and left out.
#[derive(Clone, Debug)]
pub struct Access {
    pub reporter: Reporter,
    pub source: SocketAddr,
    pub source_workload: Option<Arc<Workload>>,
    /// What it proved; None: nothing.
    pub source_identity: Option<SpiffeId>,
    /// What the client named: perhaps a service's address.
    pub asked: SocketAddr,
    /// Where the connection goes to, or came in: port 15008 when it is tunnelled.
    pub destination: SocketAddr,
    /// The application's address when it is tunnelled.
    pub hbone: Option<SocketAddr>,
    /// namespace/name
    pub service: Option<Arc<str>>,
    pub destination_workload: Option<Arc<Workload>>,
    /// What it proved, or proves to whoever asks.
    pub destination_identity: Option<SpiffeId>,
    pub began: Instant,
}

/// A connection that is being relayed.
#[derive(Debug)]
pub struct Open {
    access: Rc<Access>,
    tally: Arc<Tally>,
    _place: Place,
}

impl Access {
    /// It is relayed from now on; `bytes` are counted meanwhile.
    pub fn open(self: Box<Self>, worker: &Worker, bytes: &Rc<Bytes>) -> Open {
        let tally = worker.shared.traffic.opened(self.series(Flags::None));
        let access = Rc::from(self);
        let _place = worker.carried.enter(&access, bytes);
        Open { access, tally, _place }
    }

    /// It never was; who refused it has told so.
    pub fn denied(&self, shared: &Shared) {
        shared.traffic.failed(self.series(Flags::Denied));
    }

    /// It never was: tells so.
    pub fn failed(&self, shared: &Shared, flags: Flags, error: &str) {
        shared.traffic.failed(self.series(flags));
        self.log(&Bytes::default(), Some((flags, error)));
    }

    fn series(&self, flags: Flags) -> Series {
        Series {
            reporter: self.reporter,
            source: End::new(self.source_workload.as_deref(), self.source_identity.as_ref()),
            destination: End::new(self.destination_workload.as_deref(), self.destination_identity.as_ref()),
            service: self.service.as_deref().unwrap_or("").into(),
            flags,
            mutual_tls: self.hbone.is_some(),
        }
    }

    /// Those that ended well at debug, those that were cut at info, those that never were at warn.
    fn log(&self, bytes: &Bytes, error: Option<(Flags, &str)>) {
        let direction = match self.reporter {
            Reporter::Source => "outbound",
            Reporter::Destination => "inbound",
        };
        macro_rules! line {
            ($level:ident, $message:literal) => {
                tracing::$level!(
                    target: "access",
                    direction,
                    src.addr = %self.source,
                    src.workload = self.source_workload.as_ref().map(|one| short_name(&one.name)),
                    src.namespace = namespace(&self.source_workload, &self.source_identity),
                    src.identity = self.source_identity.as_ref().map(SpiffeId::as_str),
                    dst.addr = %self.destination,
                    dst.hbone_addr = self.hbone.map(tracing::field::display),
                    dst.service = self.service.as_deref().map(host_of),
                    dst.workload = self.destination_workload.as_ref().map(|one| short_name(&one.name)),
                    dst.namespace = namespace(&self.destination_workload, &self.destination_identity),
                    dst.identity = self.destination_identity.as_ref().map(SpiffeId::as_str),
                    bytes_sent = bytes.sent.get(),
                    bytes_recv = bytes.received.get(),
                    duration = format_args!("{}ms", self.began.elapsed().as_millis()),
                    error = error.map(|(_, error)| error),
                    $message
                )
            };
        }
        match error {
            None => line!(debug, "connection complete"),
            Some((Flags::None, _)) => line!(info, "connection complete"),
            Some(_) => line!(warn, "connection failed"),
        }
    }
}

impl Open {
    /// Bytes are those that the pod here sent and received.
    pub fn end(self, bytes: &Bytes, error: Option<&str>) {
        let (sent, received) = (bytes.sent.get(), bytes.received.get());
        let (request, response) = match self.access.reporter {
            Reporter::Source => (sent, received),
            Reporter::Destination => (received, sent),
        };
        self.tally.request_bytes.fetch_add(request, Relaxed);
        self.tally.response_bytes.fetch_add(response, Relaxed);
        self.access.log(bytes, error.map(|error| (Flags::None, error)));
        // `closed` is counted when this goes, which it does too when the relay is given up.
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.tally.closed.fetch_add(1, Relaxed);
    }
}

fn namespace<'a>(workload: &'a Option<Arc<Workload>>, identity: &'a Option<SpiffeId>) -> Option<&'a str> {
    workload.as_deref().map(Workload::namespace).or(identity.as_ref().map(SpiffeId::namespace))
}

/// A service (namespace/name) as clients look it up.
pub fn host_of(service: &str) -> String {
    match service.split_once('/') {
        Some((namespace, name)) => format!("{name}.{namespace}.svc.cluster.local"),
        None => service.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::logged;

    fn workload(name: &str) -> Arc<Workload> {
        let account = name.split_once('/').unwrap().0;
        Arc::new(Workload {
            name: name.into(),
            identity: SpiffeId::new("cluster.local", account, "web").unwrap(),
            addresses: Vec::new(),
            pod: 0,
            selected_by: None,
        })
    }

    #[test]
    fn a_connection_is_one_line_with_the_fields_of_istios_access_log() {
        let (source, destination) = (workload("shop/web-5d4f8c7b9c-x2x7q"), workload("data/db-0"));
        let access = Access {
            reporter: Reporter::Source,
            source: "10.0.0.1:40000".parse().unwrap(),
            source_identity: Some(source.identity.clone()),
            source_workload: Some(source),
            asked: "10.96.0.1:5432".parse().unwrap(),
            destination: "10.0.0.2:15008".parse().unwrap(),
            hbone: Some("10.0.0.2:5432".parse().unwrap()),
            service: Some("data/db".into()),
            destination_identity: Some(destination.identity.clone()),
            destination_workload: Some(destination),
            began: Instant::now(),
        };
        let bytes = Bytes::default();
        bytes.sent.set(7);
        bytes.received.set(9);
        let lines = logged(|| {
            access.log(&bytes, None);
            access.log(&bytes, Some((Flags::NotConnected, "nobody listens")));
        });
        let wanted = serde_json::json!({
            "message": "connection complete", "direction": "outbound",
            "src.addr": "10.0.0.1:40000", "src.workload": "web-5d4f8c7b9c-x2x7q", "src.namespace": "shop",
            "src.identity": "spiffe://cluster.local/ns/shop/sa/web",
            "dst.addr": "10.0.0.2:15008", "dst.hbone_addr": "10.0.0.2:5432",
            "dst.service": "db.data.svc.cluster.local", "dst.workload": "db-0", "dst.namespace": "data",
            "dst.identity": "spiffe://cluster.local/ns/data/sa/web", "bytes_sent": 7, "bytes_recv": 9,
        });
        let mut fields = lines[0]["fields"].clone();
        let duration = fields.as_object_mut().unwrap().remove("duration").unwrap();
        assert!(duration.as_str().unwrap().ends_with("ms"));
        assert_eq!(fields, wanted);
        assert_eq!((&lines[0]["target"], &lines[0]["level"]), (&"access".into(), &"DEBUG".into()));
        assert_eq!((&lines[1]["level"], &lines[1]["fields"]["error"]), (&"WARN".into(), &"nobody listens".into()));
    }
}
