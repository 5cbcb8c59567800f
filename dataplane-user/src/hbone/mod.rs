//! The tunnel's protocol: CONNECT streams of HTTP/2 in mutual TLS on port 15008, as Istio ambient speaks it (HBONE).
