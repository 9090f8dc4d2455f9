// A prober as the kubelet has it (k8s.io/kubernetes/pkg/probe): net/http with one connection for each probe and
// SO_LINGER of one second, and a plain connect for tcpSocket.
//
// Arguments: tcp|http, the period in milliseconds, and the addresses to probe. It runs until it is killed.
package main

import (
	"fmt"
	"io"
	"math/rand"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

var failed atomic.Int64

func dialer() *net.Dialer {
	return &net.Dialer{
		Timeout: time.Second,
		Control: func(network, address string, c syscall.RawConn) error {
			return c.Control(func(fd uintptr) {
				syscall.SetsockoptLinger(int(fd), syscall.SOL_SOCKET, syscall.SO_LINGER, &syscall.Linger{Onoff: 1, Linger: 1})
			})
		},
	}
}

func overTCP(address string) bool {
	connection, err := dialer().Dial("tcp", address)
	if err != nil {
		return false
	}
	connection.Close()
	return true
}

func overHTTP(address string) bool {
	transport := &http.Transport{DisableKeepAlives: true, DisableCompression: true, DialContext: dialer().DialContext}
	client := &http.Client{Timeout: time.Second, Transport: transport}
	request, err := http.NewRequest("GET", "http://"+address+"/ready", nil)
	if err != nil {
		return false
	}
	request.Header.Set("User-Agent", "kube-probe/1.34")
	request.Header.Set("Accept", "*/*")
	answer, err := client.Do(request)
	if err != nil {
		return false
	}
	defer answer.Body.Close()
	io.Copy(io.Discard, io.LimitReader(answer.Body, 10*1024))
	return answer.StatusCode >= 200 && answer.StatusCode < 400
}

func main() {
	probe := map[string]func(string) bool{"tcp": overTCP, "http": overHTTP}[os.Args[1]]
	millis, _ := strconv.Atoi(os.Args[2])
	period := time.Duration(millis) * time.Millisecond
	for _, address := range os.Args[3:] {
		go func(address string) {
			time.Sleep(time.Duration(rand.Int63n(int64(period))))
			for range time.Tick(period) {
				if !probe(address) {
					failed.Add(1)
				}
			}
		}(address)
	}
	for {
		time.Sleep(time.Second)
		if count := failed.Swap(0); count > 0 {
			fmt.Fprintln(os.Stderr, count, "probes failed")
		}
	}
}
